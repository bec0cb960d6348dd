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
from conftest import SCRIPT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_lecture import in_terms_of_the_lecture

VOCAB = "\n !abcdefgé€😀"
CONFIG = {"vocab_size": 13, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 8, "dropout": 0.0}


@pytest.fixture(scope="module")
def main(gpt):
    """A function that calls main() and returns the status, stdout and stderr."""

    def call(*args, stdin=b"", encoding="utf-8"):
        before = sys.stdin, sys.stdout, sys.stderr
        out, err = io.BytesIO(), io.BytesIO()
        try:
            sys.stdin = io.TextIOWrapper(io.BytesIO(stdin))
            sys.stdout = io.TextIOWrapper(out, encoding, "strict")
            sys.stderr = io.TextIOWrapper(err, encoding, "backslashreplace", write_through=True)
            status = gpt.main([str(arg) for arg in args])
            sys.stdout.flush()
            return status, out.getvalue().decode(encoding), err.getvalue().decode(encoding)
        finally:
            sys.stdin, sys.stdout, sys.stderr = before

    return call


@pytest.fixture(scope="module")
def good(gpt):
    """Two valid checkpoints, as dicts: ours, and one with the names of the lecture."""
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
        Call(Path.touch, Path(target)), Call(bytearray, 1 << 31), Call(torch.Tensor, 1 << 36),
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
        lambda t: t.to("meta"), lambda t: t.new_zeros(1).expand(1 << 61), lambda t: t[:0],
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
    buffer = io.BytesIO()
    compression = rng.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED])
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


DEEP = b"X\1\0\0\0a" + 300_000 * b"\x85"  # a tuple that holds a tuple, and so on: a hash recurses
WIDE = b"X\1\0\0\0a" + 60 * b"q\0h\0\x86"  # each tuple twice in the next: a hash takes 2^60 steps
STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\n%sX\3\0\0\0cpuK\1tQ"
PICKLES = {
    "a deep key": b"}(" + DEEP + b"K\1u",
    "a wide key": b"}" + WIDE + b"K\1s",
    "a wide key of a list of pairs": b"ccollections\nOrderedDict\n](" + WIDE + b"K\1\x86ae\x85R",
    "a wide name of a storage": STORAGE % WIDE,
    "a new object": b"ccollections\nOrderedDict\n)\x81",
    "a claim of memory": b"cbuiltins\nbytearray\nJ\0\0\0\x70\x85R",
    "a name by stack": b"X\2\0\0\0osX\6\0\0\0system\x93",
    "a function": b"cposix\nsystem\nX\4\0\0\0exit\x85R",
    "nothing on the stack": b"s",
}


@pytest.mark.parametrize("kind, hostile", PICKLES.items())
def test_pickles_made_by_hand_are_refused_at_once(main, tmp_path, kind, hostile):
    path = tmp_path / "hostile.pt"
    for name in ("a/data.pkl", "a/DATA.PKL"):  # torch ignores case
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, b"\x80\2" + hostile + b".")
            archive.writestr("a/version", b"3\n")
            if name != "a/data.pkl":
                archive.writestr("a/data.pkl", b"\x80\2}.")
        before = peak_memory()
        status, out, err = main("sample", "--weights", path)
        assert (status, out) == (2, "") and "is no checkpoint" in err and err.count("\n") == 1
        assert peak_memory() - before < 300e6
        by_us = name == "a/data.pkl" and kind != "nothing on the stack"
        assert ("more than tensors" in err) == by_us


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


# ------------------------------------------------------------------------------------- options

any_text = st.text(st.characters(exclude_categories=()), max_size=30)
known_text = st.text(VOCAB, max_size=30)
odd = st.sampled_from(["", "x", "1.5", "0x10", "１", "1_0", " 3", -1, 0, 2**63, 10**40])
counts = st.integers(1, 20) | odd
numbers = st.integers(0, 2**63 - 1) | odd
temperatures = st.floats(0, 9) | st.floats() | odd


def is_whole(value, low):
    """Whether an option takes this as a whole number from `low` to 2^63 - 1."""
    try:
        return low <= int(value) < 2**63
    except ValueError:
        return False


def is_temperature(value):
    try:
        return float(value) >= 0
    except ValueError:
        return False


@given(
    prompt=known_text | any_text,
    tokens=st.integers(1, 12) | odd,
    temperature=temperatures,
    top_k=st.none() | counts,
    seed=numbers,
    precision=st.sampled_from(["stored", "float32"]),
)
@example(prompt="-e", tokens=1, temperature=5e-324, top_k=1, seed=0, precision="stored")
@example(prompt="é€😀", tokens=9, temperature=float("inf"), top_k=None, seed=0, precision="stored")
def test_every_option_of_sample_does_what_it_says_or_is_refused(
    main, weights, prompt, tokens, temperature, top_k, seed, precision
):
    options = {"prompt": prompt, "tokens": tokens, "temperature": temperature, "top-k": top_k}
    options |= {"seed": seed, "precision": precision}
    args = [f"--{name}={value}" for name, value in options.items() if value is not None]
    stdin = b"ab"  # what is read where the prompt is a dash
    status, out, err = main("sample", "--weights", weights, *args, stdin=stdin)
    prompt = "ab" if prompt == "-" else prompt
    fits = set(prompt) <= set(VOCAB) and is_temperature(temperature) and is_whole(tokens, 1)
    fits = fits and is_whole(seed, 0) and (top_k is None or is_whole(top_k, 1))
    assert err.count("\n") == 1
    if not fits:
        assert (status, out) == (2, "") and err.startswith("error: ")
        return
    assert status == 0 and out.startswith(prompt) and len(out) == len(prompt) + int(tokens)
    assert set(out) <= set(VOCAB)
    assert main("sample", "--weights", weights, *args, stdin=stdin)[1] == out


@given(samples=st.integers(1, 5), prompt=known_text, tokens=st.integers(1, 20))
def test_several_texts_each_continue_the_prompt(main, weights, samples, prompt, tokens):
    options = "--weights", weights, f"--prompt={prompt}", "--tokens", tokens
    status, out, _ = main("sample", *options, "--samples", samples)
    texts = out.split("\n" + 40 * "-" + "\n") if samples > 1 else [out]
    assert status == 0 and len(texts) == samples
    assert all(text.startswith(prompt) and len(text) == len(prompt) + tokens for text in texts)


# --------------------------------------------------------------------------------------- texts


@settings(max_examples=15)
@given(text=st.text(min_size=60, max_size=300), encoding=st.sampled_from(["utf-8", "utf-8-sig"]))
@example(text="a" * 100, encoding="utf-8")
@example(text="one very long line " * 5000, encoding="utf-8")
@example(text="😀 and é and\r\n" * 20, encoding="utf-8-sig")
@example(text="\ufeff\r\r\n\0\x1b[31m\u2028" * 20, encoding="utf-8")
def test_any_text_is_grown_on_or_refused(gpt, main, tmp_path_factory, text, encoding):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "text.txt").write_bytes(text.encode(encoding))
    status, out, err = main("--input", folder / "text.txt", "--steps", 1, "--out", folder)
    # A mark at the beginning says how the text is encoded, and is no part of it.
    text = text.removeprefix("\ufeff" if encoding == "utf-8" else "").replace("\r\n", "\n")
    assert err.count("\n") == 1
    if len(text) < 81:
        assert (status, out) == (2, "") and "too few" in err
        return
    vocab = "".join(sorted(set(text)))
    assert status == 0 and f"{len(text):,} characters, {len(vocab)} of them distinct" in out
    assert len(out.split("last model:\n\n")[1]) == 501
    assert gpt.load(folder / "one-block.pt")[1] == vocab
    options = "--weights", folder / "one-block.pt", "--input", folder / "text.txt"
    status, out, err = main("evaluate", *options)
    losses = [line.split()[1:] for line in out.splitlines()[1:]]
    assert status == 0 and err == "" and len(losses) == 2
    assert all(measured == kept for measured, kept in losses)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437"])
def test_a_terminal_that_lacks_characters_shows_something_else(main, weights, tmp_path, encoding):
    text, prompt = tmp_path / "Bücher €.txt", "abé€😀"
    text.write_text("Zoë paid 5 € for 😀 \x1a\n" * 20, encoding="utf-8")
    options = "--weights", weights, "--prompt", prompt, "--tokens", 90
    status, out, _ = main("sample", *options, encoding=encoding)
    assert status == 0 and len(out) == len(prompt) + 90
    assert out.startswith(prompt.encode(encoding, "replace").decode(encoding))
    assert main("sample", *options, "--samples", 2, encoding=encoding)[0] == 0
    status, out, err = main("sample", "--weights", weights, "--prompt", "Ж", encoding=encoding)
    assert (status, out) == (2, "") and "never saw '\\u0416'" in err
    options = "--steps", 1, "--out", tmp_path
    assert main("--input", text, *options, encoding=encoding)[0] == 0
    options = "--weights", tmp_path / "one-block.pt"
    assert main("evaluate", *options, "--input", text, encoding=encoding)[0] == 0


def test_the_encoding_of_the_environment_is_the_terminal_s(weights):
    command = [sys.executable, SCRIPT, "sample", "--weights", weights, "--prompt", "a€"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, capture_output=True, env=environment, timeout=60)
    assert result.returncode == 0 and result.stdout.startswith(b"a?")
