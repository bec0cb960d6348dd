"""The command line end to end, as a subprocess: what it prints where, and what bad input gets."""

import io
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SCRIPT


def run(*args, stdin=None, cwd=None):
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, input=stdin, cwd=cwd, capture_output=True, timeout=100)


def refused(result):
    """One line on stderr, nothing on stdout, status 2; the line is returned."""
    line = result.stderr.decode()
    assert (result.returncode, result.stdout) == (2, b"")
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A folder in which the script grew for a few steps on a text of the test's own making."""
    folder = tmp_path_factory.mktemp("grown")
    words = random.Random(1).choices(["over", "the", "hills", "and", "far", "away,\n"], k=3000)
    (folder / "text.txt").write_text(" ".join(words), encoding="utf-8")
    result = run("--input", "text.txt", "--steps", 40, "--seed", 5, cwd=folder)
    assert result.returncode == 0, result.stderr.decode()
    return folder, result


def test_growth_prints_a_table_and_keeps_the_last_model(grown):
    folder, result = grown
    lines = result.stdout.decode().splitlines()
    rungs = [line.split()[1] for line in lines[3:9]]
    assert rungs == ["counting", "bigram", "position", "attention", "feed-forward", "block"]
    assert (folder / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == [
        "growth.png",
        "one-block.pt",
        "text.txt",
    ]
    assert b"1 bigram:" in result.stderr


def test_the_same_seed_grows_the_same(grown, tmp_path):
    folder, first = grown
    again = run(
        "grow", "--input", folder / "text.txt", "--steps", 40, "--seed", 5, "--out", tmp_path
    )

    def without_seconds(output):
        return [line[:90] for line in output.decode().splitlines()]

    assert without_seconds(again.stdout) == without_seconds(first.stdout)


def test_evaluate_confirms_what_the_file_claims(grown):
    folder, _ = grown
    result = run("evaluate", "--weights", folder / "one-block.pt", "--input", folder / "text.txt")
    for line in result.stdout.decode().splitlines()[1:]:
        _, measured, claimed = line.split()
        assert measured == claimed


def test_sampling(grown):
    folder, _ = grown
    options = "sample", "--weights", folder / "one-block.pt", "--tokens", 30, "--seed", 3
    once, again = (
        run(*options, "--prompt", "far and away"),
        run(*options, "--prompt", "-", stdin=b"far and away"),
    )
    assert once.stdout == again.stdout and once.stdout.startswith(b"far and away")
    assert len(once.stdout) == len("far and away") + 30
    assert b"characters per second" in once.stderr
    both = run(*options, "--samples", 2, "--top-k", 10**6).stdout.decode()
    assert [len(text) for text in both.split("\n" + 40 * "-" + "\n")] == [30, 30]


def test_a_closed_pipe_ends_quietly(grown):
    folder, _ = grown
    command = [sys.executable, str(SCRIPT), "sample", "--weights", str(folder / "one-block.pt")]
    process = subprocess.Popen(
        [*command, "--tokens", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""


def interrupted(command, marker):
    """What a command prints in all when Ctrl-C comes after it has printed `marker`."""
    process = subprocess.Popen(
        [sys.executable, "-u", str(SCRIPT), *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    seen = b""
    while marker not in seen:
        seen += (byte := process.stdout.read(1))
        assert byte, process.stderr.read().decode()
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and b"Traceback" not in errors
    return (seen + rest).decode()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to send")
def test_ctrl_c_keeps_the_rows_that_are_finished(grown, tmp_path):
    folder, _ = grown
    options = "--input", folder / "text.txt", "--steps", 3000, "--out", tmp_path
    output = interrupted(options, b"2 position")
    rows = [line.split()[1] for line in output.splitlines()[3:]]
    assert rows == ["counting", "bigram", "position"]
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to send")
def test_ctrl_c_keeps_the_text_that_is_drawn(grown):
    folder, _ = grown
    options = "--weights", folder / "one-block.pt", "--tokens", 10**6, "--prompt", "far"
    assert interrupted(["sample", *options], b"far").startswith("far")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--prompt", "Zoë"], "never saw 'Zë'"),
        (["--tokens", "0"], "not a whole number"),
        (["--samples", "-1"], "not a whole number"),
        (["--top-k", "0"], "not a whole number"),
        (["--temperature", "-1"], "not a number"),
        (["--temperature", "nan"], "not a number"),
        (["--weights", "none.pt"], "there are no weights"),
        (["--nonsense"], "unrecognized"),
    ],
)
def test_bad_options_of_sample(grown, options, message):
    folder, _ = grown
    assert message in refused(run("sample", "--weights", "one-block.pt", *options, cwd=folder))


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file"),
        (b"", "a text of 0 characters"),
        (b"caf\xe9" * 100, "not UTF-8"),
        (b"a" * 80, "at least 81"),
    ],
)
def test_bad_texts(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert message in refused(run("--input", path, "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_folder_is_no_text(tmp_path):
    assert "name another" in refused(run("--input", tmp_path, "--out", tmp_path / "out"))


def test_an_output_folder_that_cannot_be_made_is_found_before_training(grown):
    folder, _ = grown
    text = folder / "text.txt"
    assert "Not a directory" in refused(run("--input", text, "--out", text / "below"))
    assert "not a whole number" in refused(run("--input", text, "--steps", "0"))


class Attack:
    def __reduce__(self):
        return Path.touch, (Path("attacked"),)


def damaged(checkpoint):
    """Names and broken variants of a good checkpoint."""
    weights = checkpoint["model"]
    head = weights["lm_head.weight"]
    yield "key", {key: checkpoint[key] for key in ("config", "vocab", "model")}
    yield "heads", checkpoint | {"config": checkpoint["config"] | {"n_head": 2}}
    for size in (0, 10**12, True, "8"):
        yield f"size {size}", checkpoint | {"config": checkpoint["config"] | {"n_layer": size}}
    yield "shape", checkpoint | {"model": weights | {"lm_head.weight": head[:, 1:]}}
    yield "tensor", checkpoint | {"model": {k: v for k, v in weights.items() if k != "ln_f.bias"}}
    yield "nan", checkpoint | {"model": weights | {"lm_head.weight": head * torch.nan}}
    yield "vocab", checkpoint | {"vocab": checkpoint["vocab"][::-1]}
    yield "list", [checkpoint]
    yield "attack", checkpoint | {"training": Attack()}
    wide = checkpoint["config"] | {"block_size": 1 << 20}
    positions = torch.zeros(1, 1).expand(1 << 20, 65)
    yield "expanded", {
        **checkpoint, "config": wide, "model": weights | {"position_embedding.weight": positions}
    }  # fmt: skip


def test_damaged_weights_are_refused_and_run_nothing(gpt, grown, tmp_path, monkeypatch):
    folder, _ = grown
    monkeypatch.chdir(tmp_path)
    good = (folder / "one-block.pt").read_bytes()
    files = {"empty": b"", "cut": good[: len(good) // 2], "text": b"not a checkpoint"}
    for name, checkpoint in damaged(torch.load(io.BytesIO(good), weights_only=True)):
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        files[name] = buffer.getvalue()
    for name, content in files.items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(content)
        with pytest.raises(gpt.UserError, match="is not a checkpoint to trust"):
            gpt.load(path)
    assert not Path("attacked").exists()
    refused(run("sample", "--weights", tmp_path / "cut.pt"))
