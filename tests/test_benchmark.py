"""The benchmark: each of its rows can be measured, here on tiny amounts of work."""

import pytest
from conftest import benchmark, needs_text


@needs_text
@pytest.mark.parametrize(
    "row, sizes",
    [
        ("growth", dict(steps=2, eval_iters=1)),
        ("sampling", dict(texts=2, characters=3)),
        ("exact_loss", dict(windows=1)),
        ("iteration", dict(block_size=8, n_layer=1, n_head=1, n_embd=8, batch_size=2)),
    ],
)
def test_a_row_is_measured(row, sizes):
    cells = benchmark.measure(lambda: vars(benchmark)[row](**sizes), rounds=1).split(" | ")
    theirs, ours = (float(cell.removesuffix(" s")) for cell in cells[1:3])
    assert float(cells[3].strip(" |")) == pytest.approx(theirs / ours, rel=0.02)
