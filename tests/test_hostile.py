"""Damaged checkpoints are sampled from or refused in one line, and no code in them runs."""

import io
import os
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch
from test_lecture import in_terms_of_the_lecture

VOCAB = "\n !abcdefgé€😀"
CONFIG = {"vocab_size": 13, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 8, "dropout": 0.0}


@pytest.fixture(scope="module")
def good(gpt):
    """Two valid checkpoints, as dicts: ours, and one with the names of the lecture."""
    model = gpt.initialize(gpt.gpt, gpt.Config(**CONFIG), 0).state_dict()
    training = {"step": 7, "train_loss": 1.5, "val_loss": 2.5, "seed": 0, "device": "cpu"}
    ours = {"config": CONFIG, "vocab": VOCAB, "model": model, "training": training}
    theirs = in_terms_of_the_lecture(model, n_head=2)
    return ours, {"config": {"lr": 0.1}, "model": theirs, "training": training}


@pytest.fixture
def sample(gpt, tmp_path, capfd):
    """A function that samples from a file of these bytes: status, stdout, last line of stderr."""
    (tmp_path / "text.txt").write_text(9 * VOCAB, encoding="utf-8", newline="\n")

    def call(content):
        (tmp_path / "weights.pt").write_bytes(content)
        options = "--weights", tmp_path / "weights.pt", "--input", tmp_path / "text.txt"
        status = gpt.main(["sample", *map(str, options), "--tokens", "9", "--seed", "1"])
        out, err = capfd.readouterr()
        assert "Traceback" not in err and err.count("\n") <= 2  # the lecture's weights are reported
        return status, out, err.splitlines()[-1]

    return call


def saved(checkpoint):
    torch.save(checkpoint, buffer := io.BytesIO())
    return buffer.getvalue()


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def attack(rng, folder):
    """What leaves a file, if a pickle may run it."""
    target = str(folder / "attacked")
    attacks = [(open, target, "w"), (os.mkdir, target), (eval, f"open({target!r}, 'w')")]
    return Call(*rng.choice([*attacks, (Path.touch, Path(target))]))


def test_good_files_are_sampled_from(good, sample):
    for checkpoint in good:
        status, out, line = sample(saved(checkpoint))
        assert (status, len(out)) == (0, 9) and "characters per second" in line


@pytest.mark.parametrize("seed", range(8))
def test_code_in_a_file_does_not_run(good, sample, tmp_path, seed):
    status, out, line = sample(saved(good[0] | {"training": attack(random.Random(seed), tmp_path)}))
    assert (status, out) == (2, "")
    assert "it is not what torch.save(model.state_dict(), ...) writes" in line
    assert not (tmp_path / "attacked").exists()


def test_a_file_that_was_cut_off_is_refused(good, sample):
    content = saved(good[0])
    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        status, out, line = sample(content[:length])
        assert (status, out) == (2, "") and "is damaged" in line


def other_value(rng):
    """Something of another type or size."""
    return rng.choice([
        None, True, -1, 0, 1, 7, 3.5, 1 << 63, float("nan"), "", "x", VOCAB[::-1], "\ud800", b"x",
        [], {}, (), [1] * 5, {"config": 1}, torch.ones(3), torch.tensor(1), 1j,
    ])  # fmt: skip


def other_tensor(rng, tensor):
    """A tensor with other numbers, or of another type or shape."""
    return rng.choice([
        lambda t: t * float("nan"), lambda t: t / 0, lambda t: t * 1e30, lambda t: t * 1e3,
        lambda t: t[:1], lambda t: t[None], lambda t: t.flatten(), lambda t: torch.cat((t, t)),
        lambda t: t.long(), lambda t: t.bool(), lambda t: t.half(), lambda t: t.double(),
        lambda t: t.bfloat16(), lambda t: t.cfloat(), lambda t: t.to_sparse(), lambda t: -t,
        lambda t: t.to("meta"), lambda t: t[:0], lambda t: t.flip(0), lambda t: t[..., ::2],
        lambda t: t.new_zeros(()).expand(t.shape), lambda t: torch.nn.Parameter(t),
    ])(tensor)  # fmt: skip


def changed(rng, good, folder):
    """A checkpoint with a key removed, added or exchanged somewhere."""
    checkpoint = {key: dict(v) if isinstance(v, dict) else v for key, v in good.items()}
    place = rng.choice([checkpoint, *(checkpoint[key] for key in ("config", "model", "training"))])
    key = rng.choice(list(place))
    match rng.randrange(7):
        case 0:
            del place[key]
        case 1:
            place[key] = other_value(rng)
        case 2:
            place[rng.choice(["more", 7, "\n", None])] = other_value(rng)
        case 3:
            sizes = checkpoint["config"]
            sizes[rng.choice(list(sizes))] = rng.choice([1, 2, 4, 8, 13, 16, 1000])
        case 4:
            place[key] = attack(rng, folder)
        case _:
            key = rng.choice(list(checkpoint["model"]))
            checkpoint["model"][key] = other_tensor(rng, checkpoint["model"][key])
    return checkpoint


def flipped(rng, content):
    """Bytes, a few of them others."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def repacked(rng, content):
    """The archive with bytes flipped in the pickle, so that its checksums fit."""
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(buffer := io.BytesIO(), "w") as new,
    ):
        for name in old.namelist():
            part = old.read(name)
            new.writestr(name, flipped(rng, part) if name.endswith("data.pkl") else part)
    return buffer.getvalue()


def mutation(seed, good, folder):
    """The bytes of a file that may or may not be a checkpoint, always the same for a seed."""
    rng = random.Random(seed)
    good = rng.choice(good)
    if seed % 4 == 0:
        return flipped(rng, saved(good))
    if seed % 4 == 1:
        return repacked(rng, saved(good))
    checkpoint = changed(rng, good, folder)
    try:
        return saved(checkpoint)
    except (AttributeError, TypeError, pickle.PicklingError, UnicodeEncodeError):
        return b""  # torch.save refuses it


@pytest.mark.parametrize(
    "seeds", [range(200), pytest.param(range(200, 2000), marks=pytest.mark.long)]
)
def test_mutated_checkpoints_are_refused_or_sampled(good, sample, tmp_path, seeds):
    sampled = 0
    for seed in seeds:
        status, out, line = sample(mutation(seed, good, tmp_path))
        # A number that is not finite may show only when its position comes.
        refused = status == 2 and line.startswith("error: ") and (not out or "damaged" in line)
        assert refused or (status, len(out)) == (0, 9), (seed, line)
        sampled += status == 0
    assert 0.02 < sampled / len(seeds) < 0.6
    assert not (tmp_path / "attacked").exists()
