"""Weights from the lecture's own code: loaded with its logits, or refused by what does not fit."""

import copy
import math
import re

import pytest
import torch
from conftest import SCRIPT, module_of, named_as_in_the_lecture
from torch import nn
from torch.nn import functional as F

benchmark = module_of(SCRIPT.with_name("benchmark.py"))
TEXT = "far away, over the hills\n" * 40


@pytest.fixture
def text_path(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def theirs(gpt):
    """A model of the lecture whose every part matters, for the characters of TEXT."""
    torch.manual_seed(0)
    model = benchmark.TextbookGPT(gpt.Config(len(set(TEXT)), 16, n_layer=2, n_head=4, n_embd=32))
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.1, 0.3)
    return model.eval()


WRAPPED = {
    "bare": lambda weights: weights,
    "in a dict": lambda weights: {"step": 7, "loss": torch.ones(1), "model_state_dict": weights},
    "compiled": lambda weights: {f"_orig_mod.{name}": value for name, value in weights.items()},
    "parallel": lambda weights: {f"module.{name}": value for name, value in weights.items()},
    "wrapped": lambda weights: {f"net.model.{name}": value for name, value in weights.items()},
    "bool masks": lambda weights: {k: v.bool() if "tril" in k else v for k, v in weights.items()},
    "losses": lambda weights: {"model": weights, "losses": {i: torch.ones(1) for i in range(999)}},
    "both": lambda weights: {f"module._orig_mod.{k}": value for k, value in weights.items()},
    "float16": lambda weights: {name: value.half() for name, value in weights.items()},
    "float64": lambda weights: {name: value.double() for name, value in weights.items()},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_the_logits_are_those_of_the_lecture(gpt, theirs, text_path, tmp_path, wrap):
    torch.save(wrap(named_as_in_the_lecture(theirs)), tmp_path / "theirs.pt")
    ours, vocab, training = gpt.load(tmp_path / "theirs.pt", text_path)
    assert vocab == "".join(sorted(set(TEXT))) and training == {} and not ours.training
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    if wrap is WRAPPED["float16"]:
        theirs.half().float()
    idx = torch.randint(len(vocab), (3, 16))
    torch.testing.assert_close(ours(idx), theirs(idx), atol=1e-5, rtol=1e-5)


def test_sample_and_evaluate(gpt, theirs, text_path, tmp_path, capsys):
    path = tmp_path / "theirs.pt"
    torch.save(named_as_in_the_lecture(theirs), path)
    options = ["--weights", str(path), "--input", str(text_path)]
    assert gpt.main(["sample", *options, "--prompt", "far", "--tokens", "40"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("far") and len(text) == 43 and set(text) <= set(TEXT)
    assert gpt.main(["evaluate", *options]) == 0
    row = capsys.readouterr().out.splitlines()[2].split()[:3]
    ids = gpt.encode(gpt.split(TEXT, 16)[1], "".join(sorted(set(TEXT))))
    total = 0.0
    for start in range(0, len(ids) - 1, 16):
        y = ids[start + 1 : start + 17]
        logits = theirs(ids[None, start : start + len(y)])[0]
        total += F.cross_entropy(logits, y, reduction="sum").item()
    assert row == ["validation", f"{total / (len(ids) - 1):.4f}", "nothing"]


def in_terms_of_the_lecture(weights, n_head, queries_times=1.0):
    """Weights of ours under the names of the lecture, a module for each head."""
    named = {}
    for name, value in weights.items():
        if "qkv" in name:
            for kind, part in zip(("query", "key", "value"), value.float().chunk(3)):
                part = part * queries_times if kind == "query" else part
                for head, rows in enumerate(part.chunk(n_head)):
                    named[f"{name.split('.att')[0]}.sa.heads.{head}.{kind}.weight"] = rows.clone()
            continue
        name = name.replace("token_embedding", "token_embedding_table")
        name = name.replace("position_embedding", "position_embedding_table")
        name = name.replace("attention.", "sa.").replace("feed_forward.", "ffwd.net.")
        named[name.replace("net.up", "net.0").replace("net.down", "net.2")] = value
    return named


@pytest.fixture(scope="module")
def shipped(gpt):
    """The large model, in float32, and its vocabulary."""
    model, vocab, _ = gpt.load(gpt.WEIGHTS)
    return model.float(), vocab


@pytest.fixture
def loaded(gpt, shipped, tmp_path, capsys):
    """A function that loads weights with the text that the large model wrote: model, stderr."""
    path = tmp_path / "text.txt"
    path.write_text(gpt.read_text(gpt.MORE)[:20_000] + shipped[1], encoding="utf-8")

    def load(weights):
        torch.save(weights, tmp_path / "theirs.pt")
        model, vocab, _ = gpt.load(tmp_path / "theirs.pt", path)
        assert vocab == shipped[1]
        return model, capsys.readouterr().err

    return load


def assert_same(model, ours):
    idx = torch.randint(65, (1, 256))
    with torch.inference_mode():
        torch.testing.assert_close(model(idx), ours(idx), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("video", [False, True])
def test_both_scales_of_scores_in_the_lecture(shipped, loaded, video):
    """Its video divides by sqrt(n_embd): there queries are sqrt(n_head) times as large."""
    scale = math.sqrt(6) if video else 1.0
    model, err = loaded(in_terms_of_the_lecture(shipped[0].state_dict(), 6, scale))
    assert f"lecture's {'video' if video else 'published code'}" in err and "WARNING" not in err
    assert re.search(r"loss 1\.\d\d on the first 5,000 characters \(4\.17 if untrained\)\n", err)
    assert_same(model, shipped[0])


def test_a_last_block_that_is_only_a_layer_norm_is_ln_f(shipped, loaded):
    weights = in_terms_of_the_lecture(shipped[0].state_dict(), 6)
    for kind in ("weight", "bias"):
        weights[f"blocks.6.{kind}"] = weights.pop(f"ln_f.{kind}")
    assert_same(loaded(weights)[0], shipped[0])


def test_a_last_layer_norm_that_was_never_trained_or_is_not_there_is_left_out(shipped, loaded):
    weights = in_terms_of_the_lecture(shipped[0].state_dict(), 6)
    untrained = {"ln_f.weight": torch.ones(384), "ln_f.bias": torch.zeros(384)}
    expected = copy.deepcopy(shipped[0])
    expected.ln_f = nn.Identity()
    assert_same(loaded(weights | untrained)[0], expected)
    without = {name: value for name, value in weights.items() if "ln_f" not in name}
    assert_same(loaded(without)[0], expected)


def test_the_sizes_of_the_lecture_with_random_weights_load_with_a_warning(gpt, loaded):
    torch.manual_seed(0)
    theirs = benchmark.TextbookGPT(gpt.Config(65, block_size=256, n_layer=6, n_head=6, n_embd=384))
    model, err = loaded(named_as_in_the_lecture(theirs))
    assert sum(parameter.numel() for parameter in theirs.parameters()) == 10_788_929
    assert model.config == gpt.Config(65, 256, 6, 6, 384)
    assert "WARNING: another text, or a changed model?" in err and err.count("\n") == 1


def others(weights):
    """State dicts that do not fit, each under what should be said of it."""
    yield "it holds transformer.wte.weight", {"transformer.wte.weight": torch.ones(9, 4)}
    yield "it holds step, model", {"step": 3, "model": "large"}
    yield "no dict of weights", [weights]
    for stage in ("", "sa_head.key.weight", "sa_heads.heads.0.key.weight", "ffwd.net.0.weight"):
        table = {"token_embedding_table.weight": torch.ones(65, 65)}
        yield "an earlier stage of the lecture", table | {stage: table} if stage else table

    def renamed(old, new, before=""):
        return {before + name.replace(old, new): value for name, value in weights.items()}

    wrong = "unexpected positional_embedding_table.weight; missing position_embedding_table.weight"
    yield wrong, renamed("position_", "positional_")
    yield "unexpected blocks.0.sa_head.heads.0.key.weight, ", renamed(".sa.", ".sa_head.")
    yield "unexpected m.blocks.0.ffw.net.0.weight, ", renamed("ffwd", "ffw", "m.")
    fused = {name: value for name, value in weights.items() if "heads" not in name}
    yield (
        "unexpected blocks.0.sa.c_attn.weight; missing blocks.0.sa.heads.0.query.weight, ",
        fused | {"blocks.0.sa.c_attn.weight": torch.ones(96, 32)},
    )
    lacking = {name: value for name, value in weights.items() if "heads.1.key" not in name}
    yield "missing blocks.0.sa.heads.1.key.weight, blocks.1.sa.heads.1.key.weight\n", lacking
    square = torch.ones(32, 32)
    wrong_size = {"blocks.0.ffwd.net.0.weight": square}
    yield "size mismatch for blocks.0.feed_forward.up.weight", weights | wrong_size
    yield "unexpected gate.weight\n", weights | {"gate.weight": square}


def test_other_architectures_are_refused_by_naming_what_does_not_fit(
    gpt, theirs, text_path, tmp_path, capsys
):
    path = tmp_path / "theirs.pt"
    options = ["sample", "--weights", str(path), "--input", str(text_path)]
    for message, weights in others(named_as_in_the_lecture(theirs)):
        torch.save(weights, path)
        assert gpt.main(options) == 2
        out, err = capsys.readouterr()
        assert message in err and err.count("\n") == 1 and out == ""


def test_a_text_of_other_characters_is_refused(gpt, theirs, tmp_path, capsys):
    torch.save(named_as_in_the_lecture(theirs), tmp_path / "theirs.pt")
    (tmp_path / "other.txt").write_text("0123456789" * 20, encoding="utf-8")
    options = "--weights", str(tmp_path / "theirs.pt"), "--input", str(tmp_path / "other.txt")
    assert gpt.main(["sample", *options]) == 2
    err = capsys.readouterr().err
    assert f"knows {len(set(TEXT))} characters, the text has 10: see --input" in err
