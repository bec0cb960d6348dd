"""Sampling: how a character is chosen, the plain and the cached loop, `sample` and its end.
Oracles: computed odds, a loop without a cache that is written here, a second run."""

import io
import math
import os
import signal
import sys
from subprocess import PIPE, Popen
from unittest.mock import Mock

import pytest
import torch
from conftest import SCRIPT, gpt, seeded
from torch import nn

LOGITS = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(4000, 1)
PROMPTS = torch.randint(11, (30, 5), generator=seeded(1))


def chosen(logits, temperature, top_k):
    return gpt.choose(logits, temperature, top_k, seeded(0)).flatten().tolist()


def test_top_k_leaves_the_k_likeliest():
    assert set(chosen(LOGITS, 1e9, 2)) == {2, 3}
    assert set(chosen(LOGITS, 1e9, 99)) == set(chosen(LOGITS, 1e9, 0)) == {0, 1, 2, 3}
    assert len(set(chosen(0 * LOGITS, 1.0, 2))) == 2  # of equal ones, any two


def test_a_low_temperature_takes_the_likeliest():
    assert set(chosen(LOGITS, 0, 0)) == set(chosen(LOGITS, 0.01, 0)) == {3}


def test_temperature_divides_the_logits():
    share = chosen(LOGITS, 0.5, 2).count(3) / 4000  # the rest have id 2
    assert share == pytest.approx(1 / (1 + math.exp(-1 / 0.5)), abs=0.02)


def random_gpt(block_size, n_layer, n_head):
    """A GPT with large weights, in training mode: a loop that left dropout on would differ."""
    config = gpt.Config(11, block_size, n_layer, n_head, n_embd=24, dropout=0.5)
    model = gpt.gpt(config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.5)
    return model


@pytest.mark.parametrize("block_size, count", [(40, 36), (4, 1)])  # after 5 of a prompt
def test_within_a_window_both_loops_draw_the_same(block_size, count):
    model = random_gpt(block_size, n_layer=2, n_head=2)
    cached = list(gpt.generate_cached(model, PROMPTS, count, generator=seeded(2)))
    plain = list(gpt.generate(model, PROMPTS, count, seeded(2)))
    assert torch.equal(torch.stack(cached), torch.stack(plain))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 3, 2), (5, 1, 2), (9, 2, 3)])
def test_beyond_the_window_the_cache_starts_again_from_its_half(sizes):
    model = random_gpt(*sizes)
    block_size = sizes[0]
    cached = list(gpt.generate_cached(model, PROMPTS, 40, 0.9, 5, seeded(2)))
    model.eval()
    window = PROMPTS[:, -block_size:]
    generator = seeded(2)
    for ids in cached:
        if window.shape[1] > block_size:
            window = window[:, -max(1, block_size // 2) :]
        expected = gpt.choose(model(window)[:, -1], 0.9, 5, generator)  # (B, 1)
        assert torch.equal(ids, expected[:, 0])
        window = torch.cat((window, expected), dim=1)


def sampled(call, *options):
    status, out, _ = call("sample", *options)
    assert status == 0
    return out


@pytest.mark.parametrize("prompt", ["", "far", "far away, and far away, and"])
def test_the_prompt_is_continued_by_so_many_characters(call, prompt):
    out = sampled(call, "--prompt", prompt, "--tokens", 30)
    assert out.startswith(prompt)
    assert len(out) == len(prompt) + 30


def test_the_seed_that_is_printed_gives_the_same_text(call):
    _, out, err = call("sample")
    assert sampled(call, "--seed", err.split()[-1]) == out
    assert sampled(call) != out  # each time another seed


def test_the_defaults_are_500_characters_at_0_8(call):
    defaults = "--tokens", 500, "--temperature", 0.8, "--top-k", 0
    assert sampled(call, "--seed", 3) == sampled(call, "--seed", 3, *defaults)


def test_the_likeliest_may_be_asked_for_in_two_ways(call):
    assert sampled(call, "--temperature", 0) == sampled(call, "--top_k", 1)


def test_a_line_is_between_several_texts(call):
    out = sampled(call, "--samples", 2, "--tokens", 30)
    first, second = out.split(f"\n{40 * '-'}\n")
    assert len(first) == len(second) == 30
    assert first != second


def test_each_character_is_flushed(call, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Mock(spec=["write", "flush"]))
    call("sample", "--tokens", 30)
    assert sys.stdout.flush.call_count == 31  # the prompt, too


def test_a_prompt_from_stdin_may_come_from_windows(call, monkeypatch):
    prompt = b"\xef\xbb\xbfaway,\r\n" + "€".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt)))
    assert sampled(call, "--prompt", "-", "--tokens", 1)[:-1] == "away,\n€"


@pytest.fixture
def process(grown):
    """A process that samples until it is stopped."""
    options = "sample --weights one-block.pt --tokens 999999".split()
    command = [sys.executable, SCRIPT, *options]
    with Popen(command, cwd=grown.folder, stdout=PIPE, stderr=PIPE) as process:
        process.stdout.read(9)  # it has begun
        yield process


def test_a_closed_pipe_ends_sampling_quietly(process):
    process.stdout.close()
    assert process.wait(timeout=20) == 141
    assert process.stderr.read() == b""


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send this signal")
def test_ctrl_c_ends_sampling_quietly(process):
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == -signal.SIGINT
    assert process.stderr.read() == b""
