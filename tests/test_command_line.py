"""`grow` and `evaluate`, the download, saving, and the answers to mistakes.
Oracles: a second run, the losses in the file, files that must be as they were."""

import hashlib
import io
import math
import os
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import GROW, SCRIPT, gpt, run, some_text


def table(printed):
    return printed.split("\n\n")[1].splitlines()[1:]


def test_growth_prints_a_row_for_each_rung(grown):
    names = [row[:14].strip() for row in table(grown.out)]
    rungs = [f"{number} {rung.name}" for number, rung in enumerate(gpt.RUNGS, 1)]
    assert names == ["0 counting", *rungs]


def test_the_file_has_the_losses_of_the_last_row(grown):
    training = torch.load(grown.folder / "one-block.pt")["training"]
    losses = "{train_loss:.4f}   {val_loss:.4f}".format(**training)
    assert table(grown.out)[-1].endswith(losses)


def test_growth_prints_what_the_models_write(grown):
    assert len(re.findall("^.{14} .{60}$", grown.out, re.MULTILINE)) == 5
    _, text = grown.out.split("500 characters from the last model:\n\n")
    assert len(text) == 501
    assert set(text) <= set(some_text(900))  # no question marks for ë, € or 😀


def test_a_rung_may_be_inserted(grown, tmp_path):
    block = '    Rung("block"'
    rung = '    Rung("alone", "think alone", lambda c: Model(c, [FeedForward])),\n'
    source = SCRIPT.read_text(encoding="utf-8").replace(block, rung + block)
    (tmp_path / "grow.py").write_text(source, encoding="utf-8")
    result = run(*GROW, "--out", tmp_path, script=tmp_path / "grow.py", cwd=grown.folder)
    rows = table(result.stdout.decode())
    assert rows.pop(5).startswith("5 alone        think alone")
    *others, last = table(grown.out)
    assert rows == [*others, last.replace("5 block", "6 block")]


@pytest.fixture
def network(tmp_path, monkeypatch):
    """A function that sets the network's answer; the text is not there yet."""
    monkeypatch.setattr(gpt, "TEXT", tmp_path / "input.txt")
    monkeypatch.setattr(gpt, "SHA256", hashlib.sha256(b"the text").hexdigest())
    return lambda answer: monkeypatch.setattr(gpt, "urlopen", Mock(side_effect=[answer]))


def test_without_network_it_grows_on_the_fallback(call, network, monkeypatch, tmp_path):
    network(OSError("no network"))
    assert gpt.FALLBACK.exists()
    monkeypatch.setattr(gpt, "FALLBACK", Path("text.txt"))
    _, out, err = call("--steps", 1, "--out", tmp_path)
    assert out.startswith(f"text.txt: {len(some_text(900)):,} characters")
    assert "input.txt; using text.txt" in err
    assert sorted(os.listdir(tmp_path)) == ["growth.png", "one-block.pt"]


def test_evaluate_measures_what_the_file_says(call):
    status, out, err = call("evaluate", "--input", "text.txt")
    assert (status, err) == (0, "")  # no bars: no terminal
    train, val = out.splitlines()[1:]
    for row in (train, val):
        measured, stored, bits = map(float, row.split()[1:])
        assert measured == pytest.approx(stored, abs=2e-4)
        assert bits == pytest.approx(measured / math.log(2), abs=2e-4)


def test_the_text_is_fetched_once(network):
    network(io.BytesIO(b"the text"))
    assert gpt.read_text(gpt.TEXT) == gpt.read_text(gpt.TEXT) == "the text"


@pytest.mark.parametrize("answer", [io.BytesIO(b"the t"), OSError("timed out")])
def test_a_failed_download_leaves_nothing(network, answer):
    network(answer)
    with pytest.raises(ConnectionError, match="save it yourself as .*input.txt"):
        gpt.read_text(gpt.TEXT)
    assert not list(gpt.TEXT.parent.iterdir())


def test_if_saving_fails_the_earlier_file_is_whole(monkeypatch, tmp_path):
    path = tmp_path / "one-block.pt"
    path.write_bytes(b"earlier")
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        gpt.save(path, gpt.gpt(gpt.Config(65)), vocab="", training={})
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"earlier"]


@pytest.fixture(scope="module")
def mistaken(grown):
    """The folder, with texts and weights that people may have."""
    folder = grown.folder
    (folder / "short.txt").write_bytes(b"a" * 80)
    (folder / "latin-1.txt").write_bytes(b"caf\xe9" * 99)
    (folder / "cut.pt").write_bytes((folder / "one-block.pt").read_bytes()[:-1])
    good = torch.load(folder / "one-block.pt")
    wide = good["config"] | {"n_embd": 66}
    nan = {name: math.nan * value for name, value in good["model"].items()}
    torch.save(good | {"training": Path("object")}, folder / "object.pt")
    torch.save(good | {"config": wide}, folder / "shape.pt")
    torch.save(good | {"model": nan}, folder / "nan.pt")
    return folder


MISTAKES = {
    "sample --prompt Chloé": "the prompt has 'Clé', the model",  # h and o are known
    "sample --tokens 0": "--tokens: must be from 1 to",
    "sample --temperature nan": "--temperature must be 0, or from",
    "sample --weights cut.pt": "cut.pt is damaged, or has Python",
    "sample --weights object.pt": "object.pt is damaged, or has Python",
    "sample --weights shape.pt": "cannot use shape.pt: Error(s)",
    "sample --weights nan.pt": "logits that are not finite",
    "--input short.txt": "short.txt has 80 characters, but needs 81",
    "--input latin-1.txt": "latin-1.txt is not UTF-8: convert it",
}


@pytest.mark.parametrize("line, message", MISTAKES.items())
def test_a_mistake_gets_one_line(call, mistaken, line, message):
    before = {path: path.stat().st_mtime_ns for path in mistaken.iterdir()}
    status, out, err = call(*line.split())
    assert (status, out) == (2, "")
    assert re.fullmatch(f"error: .*{re.escape(message)}.*\n", err)
    assert {path: path.stat().st_mtime_ns for path in mistaken.iterdir()} == before
