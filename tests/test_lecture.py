"""Weights of the lecture's own code, under other names and in other layouts; misfits.
Oracle: the loss of the model that they come from, the textbook's in benchmark.py."""

from functools import cache, partial
from unittest.mock import Mock

import pytest
import torch
from conftest import gpt, some_text
from torch import nn

import benchmark
import lecture

TEXT = some_text(900)
VOCAB = gpt.vocabulary(TEXT)
TOKENS = "token_embedding_table.weight"
POSITIONS = "position_embedding_table.weight"
IDS = gpt.encode(TEXT, VOCAB)


@cache
def trained(variant=""):
    """The lecture's weights after some training, and their loss on TEXT, within 1e-4."""
    torch.manual_seed(0)
    config = gpt.Config(len(VOCAB), block_size=16, n_layer=2, n_head=4, n_embd=32)
    model = benchmark.TextbookGPT(config)
    model.config = config  # for exact_loss
    if variant == "tied":
        model.lm_head = nn.Linear(32, len(VOCAB), bias=False)
        model.lm_head.weight = model.token_embedding_table.weight
    if variant == "no ln_f":
        model.ln_f = nn.Identity()
    if variant == "biases":
        for block in model.blocks:
            for head in block.sa.heads:
                head.key, head.query, head.value = [nn.Linear(32, 8) for _ in range(3)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        benchmark.textbook_step(model, optimizer, IDS, 32)
    loss = pytest.approx(gpt.exact_loss(model, IDS), abs=1e-4)
    return rename("ffwd=ffwd.net", model.state_dict()), loss


def converted(checkpoint, text=TEXT):
    """Its loss on TEXT, its vocabulary, and the line that people read."""
    ours, line = lecture.convert(checkpoint, text, gpt.loss_of)
    return gpt.loss_of(ours, TEXT), ours["vocab"], line


def rename(changes, weights):
    """With changes of "a=b c=d", a in a name becomes b, then c becomes d."""
    for change in changes.split():
        weights = {name.replace(*change.split("=")): weights[name] for name in weights}
    return weights


def drop(part, weights):
    return {name: weights[name] for name in weights if part not in name}


def join(name, weights):
    """Stack the matrices of all heads: {} in the name becomes query, key and value."""
    stacks = {old: [weights[old]] for old in drop("heads", weights)}
    for kind in ("query", "key", "value"):
        for old in [old for old in weights if f"{kind}.weight" in old]:
            new = old.split("heads")[0] + name.format(kind)
            stacks.setdefault(new, []).append(weights[old])
    return {new: torch.cat(stacks[new]) for new in stacks}


NAMES = [
    "blocks=m._orig_mod.blocks ln_f=m._orig_mod.blocks.2 net.0=fc1",
    "ffwd=ff sa.heads=attn.h sa.=attn. proj=projection ln1=norm1 ln2=norm2",
    "ffwd.net=mlp sa.=sa_heads. ln1=layer_norm_1 ln2=layer_norm_2 key=K",
    "ffwd=feed_forward position=positional ln1=a.ln ln2=ffwd.ln query=wq",
    "token_embedding_table=wte position_embedding_table=pe lm_head=final",
    "lm_head=unembed ln1=norms.0 ln2=norms.1",
    "heads.2=heads.9 heads.3=heads.10 ln1.weight=ln1.gamma ln1.bias=ln1.beta",
]


@pytest.mark.parametrize("changes", NAMES)
def test_names_may_differ(changes):
    weights, loss = trained()
    theirs = dict(sorted(rename(changes, weights).items()))
    assert converted(theirs)[:2] == (loss, VOCAB)


SAVED = {
    "in float16": lambda w: {name: w[name].half() for name in w},
    "more positions": lambda w: w | {POSITIONS: w[POSITIONS].repeat(2, 1)[None]},
    "other tensors": lambda w: w | {"lr": 0.1, "step": torch.ones(()), "ids": torch.arange(9)},
    "in a list": lambda w: {"best": [{"loss": 1.5, "w": w}], "log": dict(enumerate(TEXT))},
    "one matrix": lambda w: {"m": join("in_proj_weight", w), "config": {"NUM_HEADS": 4}},
    "q k v": lambda w: {"m": join("{}.weight", w), "num_attention_heads": "4", "stoi": {"h": 3}},
}


@pytest.mark.parametrize("save", SAVED.values(), ids=SAVED)
def test_weights_may_be_saved_otherwise(save):
    weights, loss = trained()
    assert converted(save(weights))[0] == loss


MODELS = [
    ("biases", dict),  # saved as they are
    ("tied", dict),
    ("tied", partial(drop, "lm_head")),
    ("no ln_f", dict),
    ("no ln_f", lambda w: w | {"ln_f.weight": torch.ones(32), "ln_f.bias": torch.zeros(32)}),
]


@pytest.mark.parametrize("variant, save", MODELS)
def test_the_model_may_differ(variant, save):
    weights, loss = trained(variant)
    assert converted(save(weights))[0] == loss


FLIPPED = VOCAB[::-1]
STOI = {character: i for i, character in enumerate(FLIPPED)}


@pytest.mark.parametrize("chars", [FLIPPED, list(FLIPPED), dict(enumerate(FLIPPED)), STOI])
def test_characters_in_the_file_go_before_those_of_the_text(chars):
    weights, loss = trained()
    names = TOKENS, "lm_head.weight", "lm_head.bias"
    flipped = {name: weights[name].flip(0) for name in names}
    checkpoint = {"state": weights | flipped, "data": {"chars": chars}}
    assert converted(checkpoint, TEXT + "#+-")[:2] == (loss, FLIPPED)


@pytest.mark.parametrize("divisor, factor", [("the root of n_embd", 2), ("1", 8**-0.5)])
def test_the_scale_is_the_one_with_the_lowest_loss(divisor, factor):
    weights, loss = trained()  # 4 heads of size 8, scores divided by the root of 8
    queries = {name: factor * weights[name] for name in weights if "query" in name}
    found, _, line = converted(weights | queries)
    assert found == loss
    assert f"scores divided by {divisor}: loss 0." in line
    assert "WARNING" not in line


@pytest.mark.parametrize("losses", [(2.9, 2.8, 2.7), 3 * [torch.nan]])
def test_losses_that_are_too_high_get_a_warning(losses):
    _, line = lecture.convert(trained()[0], TEXT, Mock(side_effect=losses))
    assert f"by the root of head_size: loss {losses[0]:.2f} on" in line
    assert line.endswith("WARNING: another text, or a changed model?")


@pytest.mark.parametrize("action", ["sample", "evaluate"])
def test_both_actions_take_the_lectures_weights(action, call):
    checkpoint = {"model": trained("no ln_f")[0], "config": {}}  # keys as ours
    torch.save(checkpoint, "theirs.pt")
    status, _, err = call(action, "--weights", "theirs.pt", "--input", "text.txt")
    assert status == 0
    assert "the lecture's model" in err


MISFITS = {
    "found no blocks.1.feed_forward.up": partial(rename, "ffwd.net.0=c_fc"),
    "ln_x and blocks.1.ln_y both look like": partial(rename, "ln1=ln_x ln2=ln_y"),
    "unexpected blocks.0.sa.heads.0.query_key": partial(rename, "value=query_key"),
    "unexpected blocks.0.sa.kqv": lambda w: {"w": join("kqv.weight", w), "n_head": 4},
    "unexpected extra": lambda w: w | {"extra.bias": torch.ones(7)},
    "found no position_embedding": partial(drop, "position"),
    "no blocks .token_.*earlier stage": lambda w: rename("blocks.0.=", drop("blocks.1", w)),
    "n_head .3. times the size of a head": partial(drop, "heads.3"),
    "how many heads has blocks.0.sa.query": partial(join, "{}.weight"),
    "knows 23 characters, the text has 24": lambda w: w | {TOKENS: w[TOKENS][:23]},
    "the text has hardly any of": lambda w: {"w": w, "v": [*map(chr, range(999, 1023))]},
}


@pytest.mark.parametrize("message, change", MISFITS.items())
def test_what_does_not_fit_is_named(message, change):
    with pytest.raises(ValueError, match=message):
        converted(change(trained()[0]))
