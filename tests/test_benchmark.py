"""The benchmark: its textbook does the same work as the script, and its table is complete."""

import re

import pytest
import torch
from conftest import SCRIPT, module_of


@pytest.fixture(scope="module")
def benchmark():
    return module_of(SCRIPT.with_name("benchmark.py"))


@pytest.fixture(scope="module")
def model(gpt):
    config = gpt.Config(20, block_size=16, n_layer=2, n_head=2, n_embd=32)
    return gpt.initialize(gpt.gpt, config, seed=1)


@pytest.mark.parametrize("length", [17, 100, 1600, 1601])
def test_the_textbook_has_the_same_loss(gpt, benchmark, model, length):
    data = torch.randint(20, (length,))
    textbook = benchmark.textbook_loss(benchmark.as_textbook(model), data, batch_size=3)
    assert textbook == pytest.approx(gpt.exact_loss(model, data, 16), abs=1e-5)


def test_the_textbook_writes_the_same_greedy_text_within_the_window(
    gpt, benchmark, model, monkeypatch
):
    def likeliest(probabilities, num_samples):
        return probabilities.argmax(dim=-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", likeliest)
    idx = torch.randint(20, (3, 4))
    textbook = benchmark.textbook_generate(benchmark.as_textbook(model), idx, 12)
    ours = torch.stack(list(gpt.generate_cached(model, idx, 12, temperature=0)), dim=1)
    assert torch.equal(textbook[:, 4:], ours)


def test_the_textbook_growth_learns(gpt, benchmark):
    data, val_data = (torch.arange(n) % 5 for n in (300, 100))
    losses = benchmark.textbook_growth(gpt.Config(5), data, val_data, steps=200, eval_iters=2)
    assert max(losses) < 0.2


@pytest.fixture
def paths(gpt, model, tmp_path):
    """Options that name a small checkpoint and a text for it."""
    vocab = "".join(map(chr, range(100, 120)))
    gpt.save(tmp_path / "tiny.pt", model, vocab, {})
    (tmp_path / "text.txt").write_text(gpt.decode(torch.randint(20, (5000,)), vocab))
    return ["--weights", str(tmp_path / "tiny.pt"), "--input", str(tmp_path / "text.txt")]


def test_the_table_is_complete(benchmark, paths, capsys):
    assert benchmark.main(["--quick", "--rounds", "2", *paths]) == 0
    hardware, rounds, _, *table, _, profile = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in hardware and "GB/s" in hardware
    assert "Rounds: 2;" in rounds
    figure = r"\d+(\.\d+)?(e-\d+)?"
    assert re.search(f": {figure} ms; its 84 MFLOP .* {figure} ms .* {figure}% of", profile)
    assert len(table) == 2 + 6
    for row in table[2:]:
        title, textbook, ours, ratio, limit = row.strip("| ").split(" | ")
        for cell in (textbook, ours):
            assert re.fullmatch(rf"{figure} s \({figure}-{figure}\)", cell)
        assert re.fullmatch(rf"{figure} \({figure}-{figure}\)", ratio)
        assert re.fullmatch(f"{figure} s", limit) or (limit == "none" and "importing" in title)


def test_figures_of_a_row(benchmark):
    """The textbook does a tenth of the work in 2, 3 and 4 seconds, we do all in 1, 2 and 4."""
    row = benchmark.Row("work", textbook=1, ours=2, amount=30, rate=3, factor=10)
    line = benchmark.line(row, {1: [2.0, 3.0, 4.0], 2: [1.0, 2.0, 4.0]}, {3: 60})
    assert line == "| work | 30 s (20-40) | 2 s (1-4) | 15 (10-20) | 0.5 s |"


@pytest.mark.parametrize("option", ["--weights", "--input"])
def test_what_is_missing_is_told_in_one_line(benchmark, paths, capsys, option):
    assert benchmark.main([*paths, option, "missing"]) == 2
    output, errors = capsys.readouterr()
    assert not output and errors.startswith("error: ") and errors.count("\n") == 1
    assert "missing" in errors
