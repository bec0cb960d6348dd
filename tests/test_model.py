"""The models, their training and their sampling, against independent calculations."""

import math
from unittest.mock import Mock

import pytest
import torch
from conftest import gpt, seeded, some_text
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F


@torch.no_grad()
@pytest.mark.parametrize("n_head", [1, 6])
def test_a_gpt_computes_what_the_encoder_layers_of_pytorch_compute(n_head):
    torch.manual_seed(0)
    model = gpt.gpt(gpt.Config(65, n_embd=48, n_head=n_head, n_layer=2)).double()
    for parameter in model.parameters():  # otherwise all LayerNorms would be alike
        nn.init.normal_(parameter, 0.5, 0.5)
    mask = nn.Transformer.generate_square_subsequent_mask(8).double()
    idx = torch.randint(65, (3, 8))
    x = model.token_embedding(idx) + model.position_embedding(torch.arange(8))
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(48, n_head, 192, 0, batch_first=True, norm_first=True)
        weights = [block.attention.qkv.weight, torch.zeros(3 * 48)]
        for part in (block.attention.proj, block.feed_forward, block.ln1, block.ln2):
            weights += part.parameters()
        for theirs, ours in zip(layer.double().parameters(), weights, strict=True):
            theirs.copy_(ours)
        x = layer(x, src_mask=mask, is_causal=True)
    x = F.layer_norm(x, (48,), model.ln_f.weight, model.ln_f.bias)
    torch.testing.assert_close(model(idx), x @ model.lm_head.weight.T + model.lm_head.bias)


@torch.no_grad()
def test_only_rungs_with_attention_see_earlier_characters_and_none_sees_later_ones():
    idx = torch.arange(8)[None]
    changed = torch.where(idx == 4, 60, idx)
    for number, (_, _, make) in enumerate(gpt.RUNGS, start=1):
        model = gpt.initialize(make, gpt.Config(65), seed=0)
        differs = (model(idx) != model(changed)).any(dim=-1)  # (1, T)
        assert torch.equal(differs, idx == 4 if number <= 2 else idx >= 4)


def test_the_first_weights_depend_on_the_seed_alone_and_give_nearly_even_odds():
    idx, targets = torch.randint(65, (2, 64, 8), generator=seeded(0))
    for _, _, make in gpt.RUNGS:
        models = [gpt.initialize(make, gpt.Config(65), seed) for seed in (1, 1, 2)]
        first, again, other = [model(idx).flatten(0, 1) for model in models]
        assert torch.equal(first, again) and not torch.equal(first, other)
        loss = F.cross_entropy(first, targets.flatten()).item()
        assert loss == pytest.approx(math.log(65), abs=0.3)


def test_dropout_is_on_the_attention_weights_and_on_both_branches_and_off_in_eval(monkeypatch):
    monkeypatch.setattr(F, "dropout", spy := Mock(side_effect=lambda x, *_: 0 * x))
    block = gpt.Block(gpt.Config(65, n_embd=48, n_head=6, dropout=0.5))
    assert torch.equal(block(x := torch.randn(3, 8, 48)), x)  # each branch ends with a dropout
    calls = [(tuple(call.args[0].shape), *call.args[1:3]) for call in spy.call_args_list]
    assert calls == [((3, 6, 8, 8), 0.5, True), *2 * [((3, 8, 48), 0.5, True)]]
    block.eval()(x)
    assert not any(call.args[2] for call in spy.call_args_list[3:])


def test_a_trained_bigram_reaches_the_losses_of_a_counted_one(monkeypatch):
    monkeypatch.setattr(gpt, "LEARNING_RATE", 0.02)
    text = some_text(20_000)
    splits = gpt.split(gpt.encode(text, vocab := gpt.vocabulary(text)), 8)
    counts = torch.ones(len(vocab), len(vocab)).double()
    for first, second in zip(splits[0][:-1], splits[0][1:]):
        counts[first, second] += 1
    expected = [F.cross_entropy(counts.log()[ids[:-1]], ids[1:]).item() for ids in splits]
    assert gpt.counted_bigram(*splits, len(vocab)) == pytest.approx(expected)
    bigram = gpt.initialize(gpt.Bigram, gpt.Config(len(vocab)), seed=0)
    _, training = gpt.train(bigram, *splits, steps=1000, seed=1)
    assert [training["train_loss"], training["val_loss"]] == pytest.approx(expected, abs=0.02)


@given(length=st.integers(2, 80) | st.integers(2050, 2100), block_size=st.integers(1, 20))
@settings(max_examples=15)
def test_the_exact_loss_is_the_mean_over_every_character_but_the_first(length, block_size):
    config = gpt.Config(20, block_size, n_embd=12, n_head=2, dropout=0.5)
    model = gpt.initialize(gpt.gpt, config, seed=0)
    data, losses = torch.randint(20, (length,), generator=seeded(0)), []
    loss = gpt.exact_loss(model, data)  # without dropout
    for start in range(0, length - 1, block_size):
        targets = data[start + 1 : start + 1 + block_size]
        logits = model(data[None, start : start + len(targets)])[0]
        losses += F.cross_entropy(logits, targets, reduction="none").tolist()
    assert loss == pytest.approx(sum(losses) / (length - 1), abs=1e-5)


def test_an_epoch_has_every_window_once_and_its_targets_are_the_next_characters():
    data, starts = torch.arange(803), []
    batches = gpt.shuffled_batches(data, block_size=8, batch_size=32, seed=0)
    for x, y in (next(batches) for _ in range(4)):
        assert torch.equal(y, x + 1) and x.shape[1] == 8
        starts += x[:, 0].tolist()
    assert starts != sorted(starts) and sorted(starts) == list(range(0, 800, 8))


def test_training_keeps_its_best_weights_and_ends_at_a_rate_of_zero(monkeypatch):
    rates = Mock(side_effect=torch.optim.lr_scheduler.LambdaLR)
    monkeypatch.setattr(torch.optim.lr_scheduler, "LambdaLR", rates)
    data, val = torch.randint(30, (2, 200), generator=seeded(0))
    model = gpt.initialize(gpt.gpt, gpt.Config(30), seed=0)
    modes = set()
    model.register_forward_hook(lambda *_: modes.add((torch.is_grad_enabled(), model.training)))
    curve, training = gpt.train(model, data, val, steps=300, seed=0)
    assert modes == {(True, True), (False, False)}  # dropout is on in training alone
    losses = [loss for _, loss in curve]
    assert [step for step, _ in curve] == [10, 30, 100, 300]
    assert training["val_loss"] == min(losses) < losses[-1] - 0.5  # it overfits
    assert gpt.exact_loss(model, data) == training["train_loss"]
    assert gpt.exact_loss(model, val) == training["val_loss"]
    assert (training["step"], training["val_loss"]) in curve
    groups = rates.call_args.args[0].param_groups  # of the optimizer
    assert [(group["initial_lr"], group["lr"]) for group in groups] == [(0.005, 0), (0.025, 0)]


def random_gpt(block_size, n_layer, n_head, final_norm=nn.LayerNorm):
    config = gpt.Config(11, block_size, n_layer, n_head, n_embd=24, dropout=0.5)
    model = gpt.Model(config, [gpt.Block] * n_layer, final_norm)
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.5)
    return model


PROMPTS = torch.randint(11, (3, 5), generator=seeded(1))


@torch.no_grad()
@pytest.mark.parametrize("final_norm", [nn.LayerNorm, nn.Identity])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 3, 2), (5, 1, 2), (9, 2, 3)])
def test_beyond_the_window_cached_sampling_starts_again_with_its_last_half(sizes, final_norm):
    model = random_gpt(*sizes, final_norm)
    block_size = sizes[0]
    cached = list(gpt.generate_cached(model, PROMPTS, 40, 0.9, 5, seeded(2)))
    assert len(cached) == 40 and model.training  # as before
    model.eval()
    window = PROMPTS[:, -block_size:]
    generator = seeded(2)
    for ids in cached:
        if window.shape[1] > block_size:
            window = window[:, -max(1, block_size // 2) :]
        drawn = gpt.choose(model(window)[:, -1], 0.9, 5, generator)
        assert torch.equal(ids, drawn[:, 0])
        window = torch.cat((window, drawn), dim=1)


@pytest.mark.parametrize("n_layer", [1, 3])
def test_within_a_window_cached_sampling_draws_what_plain_sampling_draws(n_layer):
    model = random_gpt(40, n_layer, n_head=2)
    cached = list(gpt.generate_cached(model, PROMPTS, 36, generator=seeded(2)))
    plain = list(gpt.generate(model, PROMPTS, 36, seeded(2)))
    assert torch.equal(torch.stack(cached), torch.stack(plain))


def test_top_k_keeps_the_likeliest_and_temperature_divides_the_logits():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(4000, 1)
    drawn = gpt.choose(logits, 0.5, 2, seeded(0))
    equal = gpt.choose(0 * logits, top_k=2, generator=seeded(0))
    assert set(drawn.flatten().tolist()) == {2, 3} and len(set(equal.flatten().tolist())) == 2
    assert (drawn == 3).double().mean().item() == pytest.approx(1 / (1 + math.exp(-2)), abs=0.02)
    for temperature in (0, 0.01):
        assert set(gpt.choose(100 * logits, temperature).flatten().tolist()) == {3}
    assert set(gpt.choose(logits, 1e9, 99, seeded(0)).flatten().tolist()) == {0, 1, 2, 3}
