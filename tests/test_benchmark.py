"""The benchmark: its textbook does the same work as the script, and its table is complete."""

import re
from functools import partial

import pytest
import torch
from conftest import SCRIPT, module_of


@pytest.fixture(scope="module")
def benchmark():
    return module_of(SCRIPT.with_name("benchmark.py"))


@pytest.fixture(scope="module")
def model(gpt):
    config = gpt.Config(20, block_size=16, n_layer=2, n_head=2, n_embd=32)
    return gpt.initialize(gpt.gpt(config), seed=1)


@pytest.mark.parametrize("length", [17, 100, 1600, 1601])
def test_the_textbook_has_the_same_loss(gpt, benchmark, model, length):
    data = torch.randint(20, (length,))
    textbook = benchmark.textbook_loss(benchmark.as_textbook(model), data, batch_size=3)
    assert textbook == pytest.approx(gpt.exact_loss(model, data, 16), abs=1e-5)


def test_the_textbook_writes_the_same_greedy_text_within_the_window(gpt, benchmark, model):
    idx = torch.randint(20, (3, 4))
    likeliest = partial(torch.argmax, dim=-1, keepdim=True)
    textbook = benchmark.textbook_generate(benchmark.as_textbook(model), idx, 12, likeliest)
    ours = torch.stack(list(gpt.generate(model, idx, 12, temperature=0)), dim=1)
    assert torch.equal(textbook[:, 4:], ours)


def test_the_textbook_growth_learns(gpt, benchmark):
    data, val_data = (torch.arange(n) % 5 for n in (300, 100))
    losses = benchmark.textbook_growth(gpt.Config(5), data, val_data, steps=200, eval_iters=2)
    assert max(losses) < 0.2


def test_the_table_is_complete(gpt, benchmark, model, tmp_path, capsys):
    vocab = "".join(map(chr, range(100, 120)))
    gpt.save(tmp_path / "tiny.pt", model, vocab, {})
    text = gpt.decode(torch.randint(20, (5000,)), vocab)
    (tmp_path / "text.txt").write_text(text)
    paths = "--weights", str(tmp_path / "tiny.pt"), "--input", str(tmp_path / "text.txt")
    benchmark.main(["--quick", "--rounds", "2", *paths])
    hardware, rounds, _, *table, _, profile = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in hardware and "GB/s" in hardware and "2 rounds" in rounds
    assert re.search(
        r"takes \d+\.\d\d ms; its 84 MFLOP need \d+\.\d\d ms .* \d+% of the time", profile
    )
    assert len(table) == 2 + 7
    for row in table[2:]:
        title, textbook, ours, ratio, limit = row.strip("| ").split(" | ")
        for cell in (textbook, ours):
            assert re.fullmatch(r"\d+\.\d\d s \(\d+\.\d\d-\d+\.\d\d\)", cell)
        assert re.fullmatch(r"\d+\.\d\d \(\d+\.\d\d-\d+\.\d\d\)", ratio)
        assert re.fullmatch(r"\d+\.\d\d s", limit) or (limit == "none" and "importing" in title)
