"""Weights from the lecture's own code: they give its logits, or an error names the misfit."""

import copy

import pytest
import torch
from conftest import gpt, seeded, some_text
from torch import nn

import benchmark

TEXT = some_text(400)
IDS = gpt.encode(TEXT, gpt.vocabulary(TEXT))
SIZES = dict(vocab_size=len(set(TEXT)), block_size=16, n_layer=2, n_head=16, n_embd=32)


def lecture_weights(textbook):
    """The weights of the benchmark's textbook model, all named as in the lecture."""
    weights = textbook.state_dict()
    return {name.replace(".ffwd.", ".ffwd.net."): weights[name] for name in weights}


@pytest.fixture
def load(tmp_path):
    """A function: it saves a checkpoint and returns the model that the script loads from it."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")

    def load(checkpoint):
        torch.save(checkpoint, tmp_path / "theirs.pt")
        model, vocab, training = gpt.load(tmp_path / "theirs.pt", tmp_path / "text.txt")
        assert vocab == gpt.vocabulary(TEXT) and training == {} and not model.training
        return model

    return load


@pytest.fixture(scope="module")
def trained():
    """A textbook model that has learned TEXT, so that all its parts and scales matter."""
    torch.manual_seed(0)
    model = benchmark.TextbookGPT(gpt.Config(**SIZES))
    model.config = gpt.Config(**SIZES)  # for exact_loss
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        benchmark.textbook_step(model, optimizer, IDS, 32)
    return model.half().float().eval()  # numbers that float16 can hold


@torch.no_grad()
def assert_same_logits(ours, theirs):
    idx = torch.randint(len(set(TEXT)), (3, 16), generator=seeded(0))
    torch.testing.assert_close(ours(idx), theirs(idx), atol=1e-4, rtol=1e-4)


WRAPPED = {
    "in a dict": lambda weights: {"step": 7, "model_state_dict": weights},
    "compiled": lambda weights: {f"m._orig_mod.{name}": value for name, value in weights.items()},
    "float16": lambda weights: {name: value.half() for name, value in weights.items()},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_the_logits_are_those_of_the_lecture(load, trained, wrap):
    assert_same_logits(load(wrap(lecture_weights(trained))), trained)


def test_the_code_of_the_lecture_and_its_video_are_told_apart_by_their_scale(load, trained, capsys):
    """The video divides scores by sqrt(n_embd): its queries are sqrt(n_head) times as large."""
    weights = lecture_weights(trained)
    video = {name: (4 if "query" in name else 1) * value for name, value in weights.items()}
    for weights, version in ((weights, "code on GitHub"), (video, "video or Colab notebook")):
        assert_same_logits(load(weights), trained)
        err = capsys.readouterr().err
        assert f"fit the lecture's {version}: loss 0." in err and "WARNING" not in err
    load(lecture_weights(benchmark.TextbookGPT(gpt.Config(**SIZES))))  # never trained
    assert "WARNING: another text, or a changed model?\n" in capsys.readouterr().err


def test_sample_and_evaluate_take_the_lectures_weights(load, trained, tmp_path, capsys):
    load(lecture_weights(trained))
    options = "--weights", str(tmp_path / "theirs.pt"), "--input", str(tmp_path / "text.txt")
    assert gpt.main(["sample", *options]) == gpt.main(["evaluate", *options]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "nothing" in line]
    for line, ids in zip(lines, gpt.split(IDS, 16), strict=True):
        assert float(line[1]) == pytest.approx(gpt.exact_loss(trained, ids), abs=1e-4)


def test_a_missing_text_is_named(load, trained, tmp_path):
    load(lecture_weights(trained))
    with pytest.raises(FileNotFoundError, match="no.txt"):
        gpt.load(tmp_path / "theirs.pt", tmp_path / "no.txt")


def test_the_last_layer_norm_may_be_one_of_the_blocks_or_untrained_or_missing(load, trained):
    weights = lecture_weights(trained)
    in_blocks = {name.replace("ln_f", "blocks.2"): value for name, value in weights.items()}
    assert_same_logits(load(in_blocks), trained)
    without = copy.deepcopy(trained)
    without.ln_f = nn.Identity()
    missing = {name: value for name, value in weights.items() if "ln_f" not in name}
    untrained = missing | {"ln_f.weight": torch.ones(32), "ln_f.bias": torch.zeros(32)}
    for weights in (missing, untrained):
        assert_same_logits(load(weights), without)


MISFITS = {
    "a file from grow or the notebook's last cells: transformer.wte.weight":
        lambda w: {"transformer.wte.weight": w["lm_head.bias"]},
    "an earlier stage of the lecture":
        lambda w: {n: w[n] for n in w if "blocks" not in n},
    "unexpected lm_tail.bias, lm_tail.weight; missing lm_head.weight, lm_head.bias":
        lambda w: {n.replace("lm_head", "lm_tail"): w[n] for n in reversed(w)},
    "unexpected m.blocks.0.ffw.net.0.weight, .* and 5 more":
        lambda w: {"m." + n.replace("ffwd", "ffw"): w[n] for n in w},
    "missing blocks.0.sa.heads.1.key.weight, blocks.1.sa.heads.1.key.weight":
        lambda w: {n: w[n] for n in w if "heads.1.key" not in n},
    "n_head .15. times the size of a head is not n_embd .32.":
        lambda w: {n: w[n] for n in w if "heads.15" not in n},
    "the model knows 23 characters, the text has 24: see --input":
        lambda w: {n: w[n][: 23 if len(w[n]) == 24 else None] for n in w},
}  # fmt: skip


@pytest.mark.parametrize("message, change", MISFITS.items())
def test_another_model_is_refused_by_naming_what_does_not_fit(load, trained, message, change):
    with pytest.raises(gpt.UserError, match=message):
        load(change(lecture_weights(trained)))
