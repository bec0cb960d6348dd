"""Texts and checkpoints: whole or not there at all, and refused in one line if damaged."""

import copy
import errno
import hashlib
import io
import random
from pathlib import Path
from unittest.mock import Mock
from urllib.error import URLError

import pytest
import torch
from conftest import gpt


def test_the_whole_text_is_fetched_once_or_nothing_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpt, "TEXT", path := tmp_path / "input.txt")
    monkeypatch.setattr(gpt, "SHA256", hashlib.sha256(b"the text").hexdigest())
    for result, kind, message in (
        (io.BytesIO(b"the t"), gpt.UserError, "sent something other .* as .*input.txt"),
        (URLError("timed out"), ConnectionError, "cannot download https://raw.* as .*input.txt"),
        (URLError("CERTIFICATE_VERIFY_FAILED"), ConnectionError, "'Install Certificates.command'"),
    ):
        monkeypatch.setattr(gpt, "urlopen", Mock(side_effect=[result]))
        with pytest.raises(kind, match=message):
            gpt.read_text(path)
        assert not list(tmp_path.iterdir())
    monkeypatch.setattr(gpt, "urlopen", Mock(side_effect=[io.BytesIO(b"the text")]))
    assert gpt.read_text(path) == gpt.read_text(path) == "the text"  # then it is there
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"the text"]
    for content, notices in ((b"\xef\xbb\xbfthe text", 0), (b"my text", 1)):
        path.write_bytes(content)
        assert gpt.read_text(path) == content.decode("utf-8-sig")
        assert capsys.readouterr().err.count("is not Tiny Shakespeare") == notices


def test_a_full_disk_loses_no_earlier_file_and_leaves_no_half_one(tmp_path, monkeypatch):
    (path := tmp_path / "one-block.pt").write_bytes(b"earlier")
    write_bytes = Path.write_bytes

    def write_half(path, content):
        write_bytes(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OSError, match="No space left"):
        gpt.write(path, b"the new content")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"earlier"]


def test_a_file_that_cannot_be_replaced_is_kept_under_the_name_that_the_error_gives(tmp_path):
    (path := tmp_path / "one-block.pt").mkdir()  # as if Windows refused it, since it is open
    with pytest.raises(gpt.UserError, match="cannot replace .*one-block.pt ") as error:
        gpt.write(path, b"the new content")
    assert Path(str(error.value).split("the new one is ")[1]).read_bytes() == b"the new content"


ODD = [None, 0, 7, 3.5, 1 << 63, float("nan"), "", "x", b"x", [], {}, 1j, torch.ones(3)]


def damaged(checkpoint, rng):
    """Its bytes when one part, number, tensor or byte is another, or when it ends too soon."""
    place = rng.choice([checkpoint, checkpoint["config"], checkpoint["model"]])
    name, odd = rng.choice(list(place)), ODD
    if torch.is_tensor(t := place[name]):
        odd = [t * float("nan"), t * 1e30, t[:1], t.flatten(), t.long(), t.half(), t.to_sparse()]
    place[rng.choice([name, name, "more"])] = rng.choice([*odd, place[name]])
    torch.save(checkpoint, buffer := io.BytesIO())
    content = bytearray(buffer.getvalue())
    content[rng.randrange(len(content))] ^= rng.choice([0, 0, 0, 1])
    return content if rng.random() < 0.9 else content[: rng.randrange(len(content))]


@pytest.mark.parametrize("seeds", [range(99), pytest.param(range(2000), marks=pytest.mark.long)])
def test_a_damaged_checkpoint_is_sampled_from_or_refused_in_one_line(tmp_path, capsys, seeds):
    sizes = dict(vocab_size=13, block_size=8, n_layer=2, n_head=2, n_embd=8)
    model = gpt.initialize(gpt.gpt, gpt.Config(**sizes), 0).state_dict()
    good = {"config": sizes, "vocab": "\n !abcdefgé€😀", "model": model, "training": {}}
    path, statuses = tmp_path / "weights.pt", []
    for seed in seeds:
        path.write_bytes(damaged(copy.deepcopy(good), random.Random(seed)))
        options = "--weights", str(path), "--tokens", "9", "--seed", "1"
        statuses.append(gpt.main(["sample", *options]))
        out, err = capsys.readouterr()
        # A number that is not finite may show only when its position comes.
        refused = err.startswith("error: ") and (not out or "damaged" in err)
        assert refused if statuses[-1] == 2 else len(out) == 9, (seed, err)
        assert err.count("\n") == 1, (seed, err)
    assert 0.1 < statuses.count(0) / len(seeds) < 0.7 and set(statuses) == {0, 2}
