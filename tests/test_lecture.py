"""Weights from the lecture's code, whatever people call them and save with them.

The oracle is the loss of the model that they come from. What does not fit is named in an error.
"""

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


@cache
def trained(variant="", text=TEXT):
    """The lecture's weights after some training, and their loss on the text."""
    torch.manual_seed(0)
    vocab = gpt.vocabulary(text)
    ids = gpt.encode(text, vocab)
    config = gpt.Config(len(vocab), block_size=16, n_layer=2, n_head=4, n_embd=32)
    model = benchmark.TextbookGPT(config)
    model.config = config  # for exact_loss
    if variant in ("no bias", "tied"):
        model.lm_head = nn.Linear(32, len(vocab), bias=False)
    if variant == "tied":
        model.lm_head.weight = model.token_embedding_table.weight
    if variant == "no ln_f":
        model.ln_f = nn.Identity()
    if variant == "biases":
        for head in [*model.blocks[0].sa.heads, *model.blocks[1].sa.heads]:
            head.key, head.query, head.value = [nn.Linear(32, 8) for _ in range(3)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        benchmark.textbook_step(model, optimizer, ids, 32)
    return rename("ffwd=ffwd.net", model.state_dict()), gpt.exact_loss(model, ids)


def converted(checkpoint, text=TEXT):
    """Its loss on TEXT, its vocabulary, and the line that people read."""
    ours, line = lecture.convert(checkpoint, text, gpt.loss_of)
    return gpt.loss_of(ours, TEXT), ours["vocab"], line


def rename(changes, weights):
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


LAYOUTS = [  # a variant of the model, and what happened to its weights
    ("", partial(rename, "blocks=m._orig_mod.blocks ln_f=m._orig_mod.blocks.2 net.0=fc1")),
    ("", partial(rename, "ffwd=ff sa.heads=attn.h sa.=attn. proj=projection ln1=norm1 ln2=norm2")),
    ("", partial(rename, "ffwd.net=mlp sa.=sa_heads. ln1=layer_norm_1 ln2=layer_norm_2 key=K")),
    ("", partial(rename, "ffwd=feed_forward position=positional ln1=a.ln ln2=ffwd.ln query=wq")),
    ("", partial(rename, "token_embedding_table=wte osition_embedding_table=e lm_head=final")),
    ("", lambda w: dict(sorted(rename("heads.2=heads.9 heads.3=heads.10", w).items()))),
    ("", lambda w: {name: w[name].half() for name in w}),
    ("", lambda w: {n: torch.cat((w[n], w[n]))[None] if "pos" in n else w[n] for n in w}),
    ("", lambda w: w | {"lr": 0.1, "step": torch.ones(()), "ids": torch.arange(16)}),
    ("", lambda w: {"n": 1, "best": [{"loss": 1.5, "weights": w}], "log": dict(enumerate(TEXT))}),
    ("", lambda w: {"stoi": {"h": 3}, "m": join("in_proj_weight", w), "config": {"NUM_HEADS": 4}}),
    ("", lambda w: {"model": join("{}.weight", w), "num_attention_heads": "4"}),
    ("no bias", partial(rename, "lm_head=unembed ln1=norms.0 ln2=norms.1")),
    ("biases", partial(rename, "ln1.weight=ln1.gamma ln1.bias=ln1.beta")),
    ("tied", dict),
    ("tied", partial(drop, "lm_head")),
    ("no ln_f", dict),
    ("no ln_f", lambda w: w | {"ln_f.weight": torch.ones(32), "ln_f.bias": torch.zeros(32)}),
]


@pytest.mark.parametrize("variant, save", LAYOUTS)
def test_the_loss_is_that_of_the_model(variant, save):
    weights, loss = trained(variant)
    assert converted(save(weights))[:2] == (pytest.approx(loss, abs=1e-4), VOCAB)


def test_characters_in_the_file_count_whatever_the_text_has():
    weights, loss = trained()
    vocab = VOCAB[::-1]
    for name in ("token_embedding_table.weight", "lm_head.weight", "lm_head.bias"):
        weights = weights | {name: weights[name].flip(0)}
    itos = dict(enumerate(vocab))
    stoi = {character: i for i, character in itos.items()}
    for characters in (vocab, list(vocab), itos, stoi):
        found = converted({"state": weights, "data": {"chars": characters}}, TEXT + "#+-")
        assert found[:2] == (pytest.approx(loss, abs=1e-4), vocab)


@pytest.mark.parametrize("divisor", ["the root of head_size", "the root of n_embd", "1"])
def test_the_scale_is_the_one_with_the_lowest_loss(divisor):
    weights, loss = trained()
    factor = {"the root of n_embd": 2, "1": 8**-0.5}.get(divisor, 1)  # n_head 4, head_size 8
    queries = {name: factor * weights[name] for name in weights if "query" in name}
    found, _, line = converted(weights | queries)
    assert found == pytest.approx(loss, abs=1e-4)
    assert f"scores divided by {divisor}: loss 0." in line and "WARNING" not in line
    assert "on the first 5,000 characters; your own training loss should be near this" in line


@pytest.mark.parametrize("losses", [(2.5, 2.4, 2.45), (2.9, 2.8, 2.7), 3 * [torch.nan]])
def test_the_lowest_loss_chooses_unless_it_is_near_that_of_an_untrained_model(losses):
    _, line = lecture.convert(trained()[0], TEXT, Mock(side_effect=losses))
    chosen = 2.4 if 2.4 in losses else losses[0]
    assert f": loss {chosen:.2f} on" in line and all(f": {loss:.2f}" in line for loss in losses)
    assert line.endswith("WARNING: another text, or a changed model?") == (chosen != 2.4)


def test_a_file_of_the_lecture_may_have_the_keys_of_ours(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    checkpoint = {"model": trained()[0], "vocab": VOCAB, "config": {}, "training": {}}
    torch.save(checkpoint, tmp_path / "theirs.pt")
    options = ["--weights", str(tmp_path / "theirs.pt"), "--input", str(tmp_path / "text.txt")]
    assert gpt.main(["sample", *options]) == gpt.main(["evaluate", *options]) == 0
    assert capsys.readouterr().err.count("the lecture's model") == 2
    missing = gpt.main(["sample", *options[:3], "none.txt"]), capsys.readouterr().err
    assert missing == (2, "error: [Errno 2] No such file or directory: 'none.txt'\n")


MISFITS = {
    "unexpected blocks.0.c_fc, .*found no blocks.1.feed_f": partial(rename, "ffwd.net.0=c_fc"),
    "blocks.1.ln_x and blocks.1.ln_y both look like blocks.1": partial(rename, "ln1=ln_x ln2=ln_y"),
    "unexpected blocks.0.sa.heads.0.query_key": partial(rename, "value=query_key"),
    "unexpected extra": lambda w: w | {"extra.bias": torch.ones(7)},
    "unexpected blocks.0.sa.kqv": lambda w: {"w": join("kqv.weight", w), "n_head": 4},
    "found no position_embedding": partial(drop, "position"),
    "no blocks .token_.*earlier stage": lambda w: rename("blocks.0.=", drop("blocks.1", w)),
    "n_head .3. times the size of a head is not n_embd .32.": partial(drop, "heads.3"),
    "how many heads has blocks.0.sa.query. The file lacks 'n_head'": partial(join, "{}.weight"),
    "the model knows 26 characters, the text has 24: see": lambda _: trained(text="+-" + TEXT)[0],
    "the text has hardly any of": lambda w: {"w": w, "v": [*map(chr, range(999, 1023))]},
}


@pytest.mark.parametrize("message, change", MISFITS.items())
def test_another_model_is_refused_by_naming_what_does_not_fit(message, change):
    with pytest.raises(ValueError, match=message):
        converted(change(trained()[0]))
