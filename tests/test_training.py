"""Training: a bigram, the exact loss, batches, what `train` keeps, its learning rates.
Oracles: counted pairs, losses one window at a time, the lowest loss of the curve."""

from unittest.mock import Mock

import pytest
import torch
from conftest import gpt, seeded, some_text
from torch.nn import functional as F
from torch.optim import lr_scheduler

TEXT = some_text(4000)
VOCAB = gpt.vocabulary(TEXT)
SPLITS = gpt.split(gpt.encode(TEXT, VOCAB), block_size=8)


def test_a_trained_bigram_reaches_the_counted_one(monkeypatch):
    monkeypatch.setattr(gpt, "LEARNING_RATE", 0.02)
    bigram = gpt.initialize(gpt.Bigram, gpt.Config(len(VOCAB)), seed=0)
    _, training = gpt.train(bigram, *SPLITS, steps=1000, seed=1)
    counted = gpt.counted_bigram(*SPLITS, len(VOCAB))
    assert (training["train_loss"], training["val_loss"]) == pytest.approx(counted, abs=0.02)


# A part of a window; one window; three and a part; more than a batch has.
@pytest.mark.parametrize("length, block_size", [(2, 8), (9, 8), (23, 7), (2060, 8)])
def test_the_exact_loss_is_the_mean_over_all_windows(length, block_size):
    config = gpt.Config(20, block_size, n_embd=12, n_head=2, dropout=0.5)
    model = gpt.initialize(gpt.gpt, config, seed=0)
    ids = torch.randint(20, (length,), generator=seeded(0))
    loss = gpt.exact_loss(model, ids)  # without dropout, which then stays off
    total = 0
    for start in range(0, length - 1, block_size):
        window = ids[start : start + block_size + 1]  # (T + 1,)
        logits = model(window[None, :-1])[0]  # (T, V)
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    assert loss == pytest.approx(total / (length - 1), abs=1e-5)


def test_an_epoch_has_every_window_once():
    batches = gpt.shuffled_batches(torch.arange(803), 8, 32, seed=0)
    starts = torch.cat([next(batches)[0][:, 0] for _ in range(4)]).tolist()
    assert starts != sorted(starts)
    assert sorted(starts) == list(range(0, 800, 8))


def test_the_best_weights_are_kept():
    splits = torch.randint(30, (2, 200), generator=seeded(0))
    model = gpt.initialize(gpt.gpt, gpt.Config(30), seed=0)
    curve, training = gpt.train(model, *splits, steps=300, seed=0)
    step, val_loss = min(curve, key=lambda point: point[1])
    assert val_loss < curve[-1][1] - 0.5  # then it learned by heart
    train_loss = gpt.exact_loss(model, splits[0])
    assert gpt.exact_loss(model, splits[1]) == val_loss
    assert training == dict(step=step, train_loss=train_loss, val_loss=val_loss, seed=0)


def test_the_rates_fall_to_zero_in_a_straight_line(monkeypatch):
    schedule = Mock(side_effect=lr_scheduler.LambdaLR)
    monkeypatch.setattr(lr_scheduler, "LambdaLR", schedule)
    model = gpt.initialize(gpt.gpt, gpt.Config(30), seed=0)
    gpt.train(model, *torch.zeros(2, 30).long(), steps=4, seed=0)
    optimizer, share = schedule.call_args.args
    assert [share(step) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    rest, head = optimizer.param_groups
    assert (rest["initial_lr"], head["initial_lr"]) == (0.005, 0.025)
    assert rest["lr"] == head["lr"] == 0
