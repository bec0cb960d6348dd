"""The five models: what a block computes, who sees whom, where the first weights come from.
Oracles: PyTorch's encoder layer, inputs that differ in one character."""

import pytest
import torch
from conftest import gpt
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

RUNGS = [pytest.param(rung.make, id=rung.name) for rung in gpt.RUNGS]


@pytest.mark.parametrize("n_head", [1, 6])
def test_a_block_is_an_encoder_layer_of_pytorch(n_head):
    block = gpt.Block(gpt.Config(65, n_embd=48, n_head=n_head))
    torch.manual_seed(0)
    for parameter in block.parameters():  # otherwise both LayerNorms would be alike
        nn.init.normal_(parameter, 0.5, 0.5)
    weights = [block.attention.qkv.weight, torch.zeros(3 * 48)]  # we have no bias there
    for part in (block.attention.proj, block.feed_forward, block.ln1, block.ln2):
        weights += part.parameters()
    layer = nn.TransformerEncoderLayer(48, n_head, 192, 0, batch_first=True, norm_first=True)
    vector_to_parameters(parameters_to_vector(weights), layer.parameters())
    x = torch.randn(3, 8, 48)
    mask = nn.Transformer.generate_square_subsequent_mask(8)
    expected = layer(x, src_mask=mask, is_causal=True)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number", range(5))
def test_only_attention_looks_back_none_looks_ahead(number):
    model = gpt.initialize(gpt.RUNGS[number].make, gpt.Config(65), seed=0)
    idx = torch.arange(8)[None]
    changed = torch.where(idx == 4, 60, idx)
    differs = (model(idx) != model(changed)).any(dim=-1)  # (1, T)
    expected = [idx == 4, idx == 4, idx >= 4, idx >= 4, idx >= 4]
    assert torch.equal(differs, expected[number])


@pytest.mark.parametrize("make", RUNGS)
def test_the_first_weights_come_from_the_seed_alone(make):
    models = [gpt.initialize(make, gpt.Config(65), seed) for seed in (1, 1, 2)]
    first, again, other = [model(torch.arange(8)[None]) for model in models]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
