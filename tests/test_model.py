"""The model against oracles: parameter counts, causality, PyTorch's own encoder layer."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F


@pytest.mark.parametrize(
    "sizes, count",
    [({}, 60_515), ({"block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384}, 10_788_929)],
)
def test_parameter_counts(gpt, sizes, count):
    model = gpt.gpt(gpt.Config(65, **sizes))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("rung", range(5))
def test_a_later_character_changes_no_earlier_logit(gpt, rung):
    torch.manual_seed(0)
    model = gpt.RUNGS[rung][2](gpt.Config(65))
    idx = torch.randint(65, (4, 8))
    changed = idx.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 65
    before, after = model(idx), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5], after[:, 5])


@pytest.mark.parametrize("n_head", [1, 6])
def test_block_equals_the_encoder_layer_of_pytorch(gpt, n_head):
    torch.manual_seed(0)
    block = gpt.Block(gpt.Config(65, n_embd=48, n_head=n_head))
    oracle = nn.TransformerEncoderLayer(
        48, n_head, dim_feedforward=192, dropout=0.0, batch_first=True, norm_first=True
    )
    pairs = [
        (oracle.self_attn.in_proj_weight, block.attention.qkv.weight),
        (oracle.self_attn.out_proj.weight, block.attention.proj.weight),
        (oracle.self_attn.out_proj.bias, block.attention.proj.bias),
        (oracle.linear1.weight, block.feed_forward.up.weight),
        (oracle.linear1.bias, block.feed_forward.up.bias),
        (oracle.linear2.weight, block.feed_forward.down.weight),
        (oracle.linear2.bias, block.feed_forward.down.bias),
    ]
    with torch.no_grad():
        oracle.self_attn.in_proj_bias.zero_()
        for theirs, ours in pairs:
            theirs.copy_(ours)
    x = torch.randn(3, 8, 48)
    mask = nn.Transformer.generate_square_subsequent_mask(8)
    torch.testing.assert_close(block(x), oracle(x, src_mask=mask, is_causal=True))


@pytest.mark.parametrize("rung", range(5))
def test_loss_at_initialization_is_near_even_odds(gpt, rung):
    torch.manual_seed(0)
    model = gpt.RUNGS[rung][2](gpt.Config(65))
    gpt.initialize(model, 0)
    idx, targets = torch.randint(65, (2, 64, 8))
    loss = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    assert abs(loss.item() - math.log(65)) < 0.3


def test_cached_greedy_generation_equals_recomputing_within_the_window(gpt):
    torch.manual_seed(0)
    model = gpt.gpt(gpt.Config(65, block_size=32, n_layer=2, n_head=2, n_embd=32))
    gpt.initialize(model, 0)
    prompt = torch.randint(65, (3, 4))
    cached = torch.stack(list(gpt.generate(model, prompt, 28, temperature=0)), dim=1)
    idx = prompt
    for _ in range(28):
        idx = torch.cat((idx, model(idx)[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    assert torch.equal(cached, idx[:, 4:])
    assert model.training
