"""The benchmark: each of its rows can be measured, here on tiny amounts of work.
Oracle: the ratio that is printed is that of the printed seconds."""

from functools import partial

import pytest
from conftest import gpt, some_text

import benchmark

TINY = {
    "growth": partial(benchmark.growth, steps=2, eval_iters=1),
    "text": partial(benchmark.sampling, texts=1, characters=3),
    "texts": partial(benchmark.sampling, texts=2, characters=3),
    "iteration": partial(benchmark.iteration, block_size=8, n_layer=1, n_head=1, n_embd=8),
}


@pytest.mark.parametrize("name", benchmark.ROWS)
def test_each_row_can_be_measured(monkeypatch, capsys, name):
    monkeypatch.setattr(gpt, "read_text", lambda path: some_text(1000))
    monkeypatch.setitem(benchmark.ROWS, name, TINY[name])
    monkeypatch.setattr(benchmark, "measure", partial(benchmark.measure, rounds=1))
    assert not benchmark.main(["--only", name])
    theirs, _, ours, _, ratio = capsys.readouterr().out.split()[-5:]
    assert float(theirs) / float(ours) == pytest.approx(float(ratio), rel=0.02)
