"""Input that nobody should give: mutated checkpoints, any text, any option, any terminal."""

import io
import os
import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_lecture import in_terms_of_the_lecture

VOCAB = "\n !abcdefgé€😀"
CONFIG = {"vocab_size": 13, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 8, "dropout": 0.0}


@pytest.fixture(scope="module")
def main(gpt):
    """A function that calls main() and returns the status, stdout and stderr."""

    def call(*args, stdin=b""):
        streams = io.BytesIO(stdin), io.BytesIO(), io.BytesIO()
        before = sys.stdin, sys.stdout, sys.stderr
        try:
            sys.stdin, sys.stdout, sys.stderr = (io.TextIOWrapper(s, "utf-8") for s in streams)
            status = gpt.main([str(arg) for arg in args])
            sys.stdout.flush()
            sys.stderr.flush()
            return status, *(stream.getvalue().decode() for stream in streams[1:])
        finally:
            sys.stdin, sys.stdout, sys.stderr = before

    return call


@pytest.fixture(scope="module")
def good(gpt):
    """Two valid checkpoints, as the dicts that are saved: ours, and one with the lecture's names."""
    model = gpt.initialize(gpt.gpt(gpt.Config(**CONFIG)), 0).state_dict()
    training = {"step": 7, "train_loss": 1.5, "val_loss": 2.5, "seed": 0, "device": "cpu"}
    ours = {"config": CONFIG, "vocab": VOCAB, "model": model, "training": training}
    theirs = in_terms_of_the_lecture(model, n_head=2)
    return ours, {"config": {"lr": 0.1}, "model": theirs, "training": training}


def saved(checkpoint):
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def weights(good, tmp_path_factory):
    """The file of the valid checkpoint."""
    path = tmp_path_factory.mktemp("hostile") / "good.pt"
    path.write_bytes(saved(good[0]))
    return path


@pytest.fixture(scope="module")
def text(weights):
    """The file of a text with the vocabulary of both checkpoints."""
    path = weights.with_name("text.txt")
    path.write_text(9 * VOCAB, encoding="utf-8", newline="\n")
    return path


# --------------------------------------------------------------------------------- checkpoints


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def attacks(rng, folder):
    """What a pickle should not get away with: code that leaves a file, and claims of memory."""
    target = str(folder / "attacked")
    return rng.choice([
        Call(open, target, "w"), Call(os.mkdir, target), Call(eval, f"open({target!r}, 'w')"),
        Call(Path.touch, Path(target)), Call(bytearray, 1 << 36), Call(torch.Tensor, 1 << 36),
        Call(torch.zeros, 1 << 34), Call(torch.nn.Linear, 1 << 17, 1 << 17), Call(bytes, 1 << 36),
        Call(list, range(1 << 30)), Call(torch.load, target), Call(set, "ab"), Call(complex, 1),
    ])  # fmt: skip


def other_value(rng):
    """Something of another type or size."""
    return rng.choice([
        None, True, -1, 0, 1, 7, 3.5, 1 << 20, 1 << 63, 10**40, float("nan"), "", "x", VOCAB[::-1],
        "\ud800", b"x", [], {}, (), [1] * 5, {"config": 1}, torch.ones(3), torch.tensor(1), 1j,
    ])  # fmt: skip


def other_tensor(rng, tensor):
    """A tensor with other numbers, or of another kind, shape or claimed size."""
    return rng.choice([
        lambda t: t * float("nan"), lambda t: t / 0, lambda t: t * 1e30, lambda t: t * 1e3,
        lambda t: t[:1], lambda t: t[None], lambda t: t.flatten(), lambda t: torch.cat((t, t)),
        lambda t: t.long(), lambda t: t.bool(), lambda t: t.half(), lambda t: t.double(),
        lambda t: t.bfloat16(), lambda t: t.cfloat(), lambda t: t.to_sparse(), lambda t: -t,
        lambda t: t.to("meta"), lambda t: t.new_zeros(1).expand(1 << 40), lambda t: t[:0],
        lambda t: t.new_zeros(()).expand(t.shape), lambda t: t.flip(0), lambda t: t[..., ::2],
        lambda t: t.new_zeros(1, 1).expand(1 << 16, 1 << 16), lambda t: torch.nn.Parameter(t),
    ])(tensor)  # fmt: skip


def changed(rng, good, folder):
    """A checkpoint with a key removed, added or exchanged somewhere."""
    checkpoint = {key: dict(v) if isinstance(v, dict) else v for key, v in good.items()}
    place = rng.choice([checkpoint, *(checkpoint[key] for key in ("config", "model", "training"))])
    key = rng.choice(list(place))
    match rng.randrange(8):
        case 0:
            del place[key]
        case 1:
            place[key] = other_value(rng)
        case 2:
            place[rng.choice(["more", 7, "\n", None])] = other_value(rng)
        case 3:
            sizes = checkpoint["config"]
            for key in rng.choices(list(sizes), k=2):
                sizes[key] = rng.choice([1, 2, 4, 8, 13, 16, 1000, 4096, 1 << 16, 1 << 30])
        case 4:
            place[key] = attacks(rng, folder)
        case 5:
            return rng.choice([checkpoint["model"], list(checkpoint.items()), other_value(rng)])
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


def rebuilt(rng, content):
    """The archive with bytes flipped in the pickle, where checksums then fit, or compressed."""
    buffer, compression = (
        io.BytesIO(),
        rng.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED]),
    )
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(buffer, "w", compression) as new,
    ):
        for name in old.namelist():
            part = old.read(name)
            part = flipped(rng, part) if name.endswith("data.pkl") else part
            if rng.random() > 0.01:
                new.writestr(name, part)
    return buffer.getvalue()


def mutation(seed, good, folder):
    """The bytes of a file that may or may not be a checkpoint, always the same for a seed."""
    rng = random.Random(seed)
    good = rng.choice(good)
    content = saved(good)
    match seed % 5:
        case 0:
            return flipped(rng, content)
        case 1:
            start, end = sorted(rng.choices(range(len(content)), k=2))
            return rng.choice([content[:start], content[:start] + content[end:], content[start:]])
        case 2:
            return rebuilt(rng, content)
    checkpoint = changed(rng, good, folder)
    try:
        return saved(checkpoint)
    except (AttributeError, TypeError, pickle.PicklingError, UnicodeEncodeError):
        return b""  # torch.save refuses it


def peak_memory():
    """The most that this process has ever used, in bytes; 0 where it cannot be told."""
    if sys.platform != "linux":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def survives(main, good, text, path, seed):
    """Whether a mutation is sampled from, having been found to be that or refused in one line."""
    path.write_bytes(mutation(seed, good, path.parent))
    status, out, err = main("sample", "--weights", path, "--input", text, "--tokens", 9)
    assert err.count("\n") == 1 and "Traceback" not in err, (seed, err)
    assert (status, len(out)) == (0, 9) or (status, out, err[:7]) == (2, "", "error: "), (seed, err)
    return status == 0


def test_the_fuzz_begins_with_good_files(main, good, text, tmp_path):
    for checkpoint in good:
        (tmp_path / "good.pt").write_bytes(saved(checkpoint))
        options = "--weights", tmp_path / "good.pt", "--input", text, "--tokens", 9
        status, out, err = main("sample", *options)
        assert (status, len(out)) == (0, 9) and "characters per second" in err


@pytest.mark.parametrize(
    "seeds", [range(200), pytest.param(range(200, 2000), marks=pytest.mark.long)]
)
def test_mutated_checkpoints_are_refused_or_sampled(main, good, text, tmp_path, seeds):
    before = peak_memory()
    sampled = sum(survives(main, good, text, tmp_path / "mutated.pt", seed) for seed in seeds)
    assert 0.02 < sampled / len(seeds) < 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["mutated.pt"]
    assert peak_memory() - before < 200e6
