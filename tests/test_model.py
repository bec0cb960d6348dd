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


def test_a_later_character_changes_no_earlier_logit(gpt):
    torch.manual_seed(0)
    for _, _, build in gpt.RUNGS:
        model = build(gpt.Config(65))
        idx = torch.randint(65, (4, 8))
        changed = idx.clone()
        changed[:, 5] = (changed[:, 5] + 1) % 65
        before, after = model(idx), model(changed)
        assert torch.equal(before[:, :5], after[:, :5])
        assert not torch.equal(before[:, 5], after[:, 5])


def copy_block(block, layer):
    """Give a TransformerEncoderLayer of PyTorch the weights of a block."""
    pairs = [
        (layer.self_attn.in_proj_weight, block.attention.qkv.weight),
        (layer.self_attn.out_proj, block.attention.proj),
        (layer.linear1, block.feed_forward.up),
        (layer.linear2, block.feed_forward.down),
        (layer.norm1, block.ln1),
        (layer.norm2, block.ln2),
    ]
    layer.self_attn.in_proj_bias.zero_()
    for theirs, ours in pairs:
        if isinstance(theirs, nn.Parameter):
            theirs.copy_(ours)
        else:
            theirs.load_state_dict(ours.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("n_head", [1, 6])
def test_the_model_equals_encoder_layers_of_pytorch(gpt, n_head):
    torch.manual_seed(0)
    model = gpt.gpt(gpt.Config(65, n_embd=48, n_head=n_head, n_layer=2)).double()
    for parameter in model.parameters():  # otherwise all LayerNorms were alike
        nn.init.normal_(parameter, 0.5, 0.5)
    mask = nn.Transformer.generate_square_subsequent_mask(8).double()
    idx = torch.randint(65, (3, 8))
    x = model.token_embedding(idx) + model.position_embedding(torch.arange(8))
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(
            48, n_head, 192, dropout=0.0, activation="relu", batch_first=True, norm_first=True
        ).double()
        copy_block(block, layer)
        expected = layer(x, src_mask=mask, is_causal=True)
        torch.testing.assert_close(block(x), expected)
        x = expected
    final = F.layer_norm(x, (48,), model.ln_f.weight, model.ln_f.bias)
    torch.testing.assert_close(model(idx), final @ model.lm_head.weight.T + model.lm_head.bias)


def test_dropout_is_where_it_should_be_and_off_in_eval_mode(gpt, monkeypatch):
    """On the attention weights and on the output of both branches."""
    block = gpt.Block(gpt.Config(65, n_embd=48, n_head=6, dropout=0.5))
    shapes = []
    dropout = F.dropout

    def spy(x, p, training, inplace):
        shapes.append((tuple(x.shape), p, training))
        return dropout(x, p, training, inplace)

    monkeypatch.setattr(F, "dropout", spy)
    x = torch.randn(3, 8, 48)
    assert not torch.equal(block(x), block(x))
    assert shapes[:3] == [((3, 6, 8, 8), 0.5, True), *2 * [((3, 8, 48), 0.5, True)]]
    block.eval()
    assert torch.equal(block(x), block(x))


def test_the_names_in_a_checkpoint(gpt):
    part = ["ln1.weight", "ln1.bias", "attention.qkv.weight", "attention.proj.weight"]
    part += ["attention.proj.bias", "ln2.weight", "ln2.bias", "feed_forward.up.weight"]
    part += ["feed_forward.up.bias", "feed_forward.down.weight", "feed_forward.down.bias"]
    names = ["token_embedding.weight", "position_embedding.weight"]
    names += [f"blocks.{n}.{name}" for n in range(2) for name in part]
    names += ["ln_f.weight", "ln_f.bias", "lm_head.weight", "lm_head.bias"]
    assert list(gpt.gpt(gpt.Config(65, n_layer=2)).state_dict()) == names


def test_loss_at_initialization_is_near_even_odds(gpt):
    for _, _, make in gpt.RUNGS:
        model = gpt.initialize(make, gpt.Config(65), seed=0)
        idx, targets = torch.randint(65, (2, 64, 8))
        loss = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
        assert abs(loss.item() - math.log(65)) < 0.3
