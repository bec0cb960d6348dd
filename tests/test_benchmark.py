"""The benchmark: each row can be measured (here on tiny work), with the ratio of its seconds.
Oracle: sleep, which takes three times as long for three times as many seconds."""

import time
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
def test_each_row_can_be_measured(monkeypatch, name):
    monkeypatch.setattr(gpt, "read_text", lambda path: some_text(1000))
    monkeypatch.setitem(benchmark.ROWS, name, TINY[name])
    assert not benchmark.main(["--only", name])


def test_the_ratio_is_that_of_the_seconds():
    works = [partial(time.sleep, seconds) for seconds in (0.3, 0.1)]
    line = benchmark.measure(lambda: ("sleep", *works))
    assert float(line.split()[-1]) == pytest.approx(3, rel=0.1)
