"""The benchmark: its textbook does the same work as the script, and each row can be measured."""

import re
import time

import pytest
import torch
from conftest import SCRIPT, module_of, named_as_in_the_lecture
from torch import nn

import lecture

benchmark = module_of(SCRIPT.with_name("benchmark.py"))
LARGE = benchmark.gpt.WEIGHTS.exists() and benchmark.gpt.TEXT.exists()


@pytest.fixture
def models(gpt):
    """The textbook's model and ours, with the same weights, all of which matter."""
    torch.manual_seed(0)
    theirs = benchmark.TextbookGPT(gpt.Config(20, block_size=16, n_layer=2, n_head=4, n_embd=32))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, 0.1, 0.3)
    checkpoint, _ = lecture.convert(named_as_in_the_lecture(theirs), "a" * 20)
    return theirs, gpt.build(checkpoint)[0]


def test_the_textbook_has_the_same_loss(gpt, models, monkeypatch):
    theirs, ours = models
    data = torch.arange(20).repeat(5)[: 3 * 16 + 1]  # a batch of these windows has all of it
    monkeypatch.setattr(torch, "randint", lambda *_: torch.tensor([0, 16, 32]))
    loss = benchmark.random_batch_loss(theirs, data, batch_size=3).item()
    assert loss == pytest.approx(gpt.exact_loss(ours, data, 16), abs=1e-5)


def test_the_textbook_writes_the_same_greedy_text_within_the_window(gpt, models, monkeypatch):
    theirs, ours = models
    monkeypatch.setattr(torch, "multinomial", lambda p, _: p.argmax(dim=-1, keepdim=True))
    idx = torch.randint(20, (3, 4))
    texts = torch.stack(list(gpt.generate_cached(ours, idx, 12, temperature=0)), dim=1)
    assert torch.equal(benchmark.textbook_generate(theirs, idx, 12)[:, 4:], texts)


def test_the_textbook_learns(gpt):
    splits = [torch.arange(n) % 5 for n in (300, 100)]
    assert benchmark.textbook_training(gpt.Config(5), splits, steps=200, eval_iters=2).max() < 0.2


@pytest.mark.skipif(not LARGE, reason="the weights or the text are not there")
@pytest.mark.parametrize(
    "row",
    [
        lambda: benchmark.growth(steps=2, eval_iters=1),
        lambda: benchmark.sampling(texts=2, characters=3),
        lambda: benchmark.exact_loss(windows=1),
        lambda: benchmark.iteration(block_size=8, n_layer=1, n_head=1, n_embd=8, batch_size=2),
    ],
    ids=["growth", "sampling", "exact_loss", "iteration"],
)
def test_a_row_is_measured(row):
    _, theirs, ours, factor = benchmark.measure(row, rounds=1).strip("| ").split(" | ")
    seconds = [float(re.fullmatch(r"([\d.e-]+) s", cell)[1]) for cell in (theirs, ours)]
    assert float(factor) == pytest.approx(seconds[0] / seconds[1], rel=0.02)


def test_only_one_row_and_a_missing_file(capsys, monkeypatch, tmp_path):
    works = lambda: time.sleep(0.1), lambda: None
    monkeypatch.setitem(benchmark.ROWS, "loss", lambda: ("work", *works))
    assert not benchmark.main(["--only", "loss"])
    head, _, _, _, row = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in head and row.startswith("| work | 0.1")
    assert float(row.strip("| ").split(" | ")[-1]) > 10
    monkeypatch.setattr(benchmark.gpt, "WEIGHTS", tmp_path / "missing.pt")
    assert benchmark.main(["--only", "text"]) == 2
    assert re.fullmatch("error: .*missing.pt.*\n", capsys.readouterr().err)
