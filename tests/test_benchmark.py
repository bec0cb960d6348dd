"""The benchmark: each of its rows can be measured, here on tiny amounts of work."""

import pytest
from conftest import needs_text

import benchmark

TINY = {
    "growth": lambda: benchmark.growth(steps=2, eval_iters=1),
    "sampling": lambda: benchmark.sampling(texts=2, characters=3),
    "exact loss": lambda: benchmark.exact_loss(windows=1),
    "iteration": lambda: benchmark.iteration(block_size=8, n_layer=1, n_head=1, n_embd=8),
}


@needs_text
@pytest.mark.parametrize("row", TINY.values(), ids=TINY)
def test_a_row_is_measured(row):
    _, theirs, ours, factor = benchmark.measure(row, rounds=1).strip("| ").split(" | ")
    assert float(theirs[:-2]) / float(ours[:-2]) == pytest.approx(float(factor), rel=0.02)
