"""The command line end to end, as a subprocess: what it prints where, and what bad input gets."""

import io
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SCRIPT


def run(*args, script=SCRIPT, **options):
    command = [sys.executable, str(script), *map(str, args)]
    return subprocess.run(command, capture_output=True, timeout=100, **options)


def refused(status, stdout, stderr):
    """Status 2, nothing on stdout, one line on stderr, which is returned."""
    assert (status, stdout) == (2, "")
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    return stderr


@pytest.fixture
def refusal(gpt, capfd):
    """A function that runs a command in this process and returns the line that refuses it."""
    return lambda *args: refused(gpt.main([str(arg) for arg in args]), *capfd.readouterr())


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
    rows = [line.split() for line in lines[4:10]]
    rungs = [row[1] for row in rows]
    assert rungs == ["counting", "bigram", "position", "attention", "feed-forward", "block"]
    vocab = "".join(sorted(set((folder / "text.txt").read_text(encoding="utf-8"))))
    parameters, train_loss, val_loss, bits = (float(n.replace(",", "")) for n in rows[-1][-5:-1])
    assert parameters == 60_515 - 65 * 65 - 66 * 65 + len(vocab) * (65 + 66)
    assert bits == pytest.approx(val_loss / math.log(2), abs=2e-4)
    training = torch.load(folder / "one-block.pt", weights_only=True)["training"]
    assert (train_loss, val_loss) == pytest.approx(
        (training["train_loss"], training["val_loss"]), abs=1e-4
    )
    assert training["step"] == 40 and training["seed"] == 5
    assert len("\n".join(lines).split("last model:\n\n")[1]) >= 499
    assert (folder / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == [
        "growth.png",
        "one-block.pt",
        "text.txt",
    ]
    assert result.stderr == b"wrote one-block.pt and growth.png\n"  # no bars: no terminal


def test_the_same_seed_grows_the_same(grown, tmp_path):
    folder, first = grown
    again = run(
        "grow", "--input", folder / "text.txt", "--steps", 40, "--seed", 5, "--out", tmp_path
    )

    def without_seconds(output):
        return [line[:73] for line in output.decode().splitlines()]

    assert without_seconds(again.stdout) == without_seconds(first.stdout)


def test_evaluate_confirms_what_the_file_claims(grown):
    folder, _ = grown
    result = run("evaluate", "--weights", folder / "one-block.pt", "--input", folder / "text.txt")
    assert result.returncode == 0
    rows = [line.split() for line in result.stdout.decode().splitlines()[1:]]
    assert [row[0] for row in rows] == ["train", "validation"]
    for _, measured, claimed in rows:
        assert measured == claimed


def test_sampling(grown):
    folder, _ = grown
    options = "sample", "--weights", folder / "one-block.pt", "--tokens", 30, "--seed", 3
    once, again = (
        run(*options, "--prompt", "far and away"),
        run(*options, "--prompt", "-", input=b"\xef\xbb\xbffar and away"),
    )
    assert once.stdout == again.stdout and once.stdout.startswith(b"far and away")
    assert len(once.stdout) == len("far and away") + 30
    assert b"characters per second" in once.stderr
    for prompt in ("", "far and away, over the hills"):  # none, and one beyond the window
        text = run(*options, "--prompt", prompt).stdout.decode()
        assert text.startswith(prompt) and len(text) == len(prompt) + 30
    both = run(*options, "--samples", 2, "--top-k", 10**6).stdout.decode()
    assert [len(text) for text in both.split("\n" + 40 * "-" + "\n")] == [30, 30]


def test_a_prompt_with_two_lines_in_the_way_of_windows(grown):
    folder, _ = grown
    options = "sample", "--weights", folder / "one-block.pt", "--tokens", 1, "--prompt", "-"
    assert run(*options, input=b"far\r\naway").stdout.startswith(b"far\naway")


@pytest.mark.skipif(sys.platform == "win32", reason="sh is of Unix")
def test_growth_ends_when_its_reader_has_seen_enough(grown):
    folder, _ = grown
    command = [sys.executable, SCRIPT, "--input", folder / "text.txt", "--out", folder]
    piped = f"{shlex.join(map(str, command))} 2>&1 | head -n 4"
    subprocess.run(piped, shell=True, check=True, stdout=subprocess.DEVNULL, timeout=60)


@pytest.mark.skipif(sys.platform == "win32", reason="sh is of Unix")
def test_streams_may_be_closed(grown):
    folder, _ = grown
    command = [sys.executable, SCRIPT, "sample", "--weights", folder / "one-block.pt"]
    quiet = f"{shlex.join(map(str, command))} --tokens 2 --prompt - <&- >&- 2>&-"
    assert subprocess.run(quiet, shell=True, timeout=60).returncode == 0


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


@pytest.mark.skipif(sys.platform == "win32", reason="ulimit is of Unix")
def test_nobody_reads_stderr_and_a_full_disk(grown, tmp_path):
    folder, _ = grown
    options = "--input", folder / "text.txt", "--steps", 2, "--out", tmp_path
    unread, unwritten = os.pipe()
    os.close(unread)  # a pipe without a reader
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=unwritten, timeout=100)
    os.close(unwritten)
    assert result.returncode == 0 and re.search(rb"^\d+ block ", result.stdout, re.M)
    before = (tmp_path / "one-block.pt").read_bytes()
    limited = ["bash", "-c", 'ulimit -f 100; trap "" XFSZ; exec "$@"', "bash", *command]
    result = subprocess.run(limited, capture_output=True, timeout=100)
    assert result.returncode == 2 and b"one-block.pt: File too large" in result.stderr
    assert b"Traceback" not in result.stderr
    assert (tmp_path / "one-block.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["growth.png", "one-block.pt"]


def interrupted(command, marker, status):
    """What a command prints in all when Ctrl-C, after it has printed `marker`, ends it."""
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
    assert process.returncode == status and b"Traceback" not in errors
    return (seen + rest).decode()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to send")
def test_ctrl_c_keeps_the_rows_that_are_finished(grown, tmp_path):
    folder, _ = grown
    options = "--input", folder / "text.txt", "--steps", 3000, "--out", tmp_path
    output = interrupted(options, b"2 position", -signal.SIGINT)
    rows = [line.split()[1] for line in output.splitlines()[4:]]
    assert rows == ["counting", "bigram", "position"]
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to send")
def test_ctrl_c_keeps_the_text_that_is_drawn(grown):
    folder, _ = grown
    options = "--weights", folder / "one-block.pt", "--tokens", 10**6, "--prompt", "far"
    assert interrupted(["sample", *options], b"far", 130).startswith("far")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--prompt", "Zoë"], "never saw 'Zë'"),
        (["--tokens", "0"], "not a whole number"),
        (["--samples", "-1"], "not a whole number"),
        (["--top-k", "0"], "not a whole number"),
        (["--temperature", "-1"], "not a number"),
        (["--temperature", "nan"], "not a number"),
        (["--weights", "none.pt"], "no file of weights none.pt"),
        (["--prompt", "-x"], "before a dash, put ="),
        (["--nonsense"], "unrecognized"),
    ],
)
def test_bad_options_of_sample(grown, refusal, options, message):
    folder, _ = grown
    assert message in refusal("sample", "--weights", folder / "one-block.pt", *options)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file"),
        (b"", "0 characters, too few"),
        (b"caf\xe9" * 100, "not UTF-8"),
        (b"a" * 80, "give it 81 or more"),
        ("".join(map(chr, range(20_000, 31_000))).encode(), "11,000 distinct characters"),
    ],
)
def test_bad_texts(refusal, tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert message in refusal("--input", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_is_no_text_and_no_weights(refusal, tmp_path):
    assert "Is a directory" in refusal("--input", tmp_path, "--out", tmp_path / "out")
    assert "no file of weights" in refusal("sample", "--weights", tmp_path)


NO_NETWORK = os.environ | {"https_proxy": "http://127.0.0.1:9"}


def test_without_network_and_text_it_grows_on_what_the_large_model_wrote(grown, tmp_path):
    folder, _ = grown
    script, more = shutil.copy(SCRIPT, tmp_path), tmp_path / "assets" / "more.txt"
    more.parent.mkdir()
    shutil.copy(folder / "text.txt", more)
    result = run("--steps", 5, script=script, cwd=tmp_path, env=NO_NETWORK)
    assert result.returncode == 0
    assert result.stdout.decode().startswith(f"more.txt: {len(more.read_text()):,} characters")
    warnings = result.stderr.decode().splitlines()[:3]
    assert all(line.startswith("WARNING: ") for line in warnings)
    for part in ("tinyshakespeare/input.txt", str(tmp_path / "input.txt"), "86c4e6aa9db7c042"):
        assert part in warnings[0]
    assert f"growing on {more} instead" in warnings[1] and f"--input {more}" in warnings[2]
    assert not (tmp_path / "input.txt").exists()
    options = "evaluate", "--weights", "one-block.pt"  # on a text that the user did not ask for?
    assert run(*options, script=script, cwd=tmp_path, env=NO_NETWORK).returncode == 2


def test_a_clone_with_neither_network_nor_texts_nor_weights(tmp_path):
    script = shutil.copy(SCRIPT, tmp_path)
    result = run(script=script, cwd=tmp_path, env=NO_NETWORK)
    line = refused(result.returncode, result.stdout.decode(), result.stderr.decode())
    for part in ("tinyshakespeare/input.txt", str(tmp_path / "input.txt"), "86c4e6aa9db7c042"):
        assert part in line
    result = run("sample", script=script, cwd=tmp_path)
    line = refused(result.returncode, result.stdout.decode(), result.stderr.decode())
    assert "gpt_shakespeare.pt" in line and "one-block.pt" in line
    assert [path.name for path in tmp_path.iterdir()] == [SCRIPT.name]


def test_evaluate_refuses_a_text_that_does_not_fit(grown, refusal, tmp_path):
    folder, _ = grown
    path = tmp_path / "text.txt"
    for text, message in (("far", "too few"), ("0123456789" * 20, "never saw '0123456789'")):
        path.write_text(text, encoding="utf-8")
        options = "--weights", folder / "one-block.pt", "--input", path
        assert message in refusal("evaluate", *options)


def test_an_output_folder_that_cannot_be_used_is_found_before_training(grown, refusal, monkeypatch):
    folder, _ = grown
    text = folder / "text.txt"
    assert "Not a directory" in refusal("--input", text, "--out", text / "below")
    (folder / "out" / "growth.png").mkdir(parents=True)
    assert "is a directory" in refusal("--input", text, "--out", folder / "out")
    misnamed = Path(shutil.copy(text, folder / "out" / "one-block.pt"))
    assert "or the text itself" in refusal("--input", misnamed, "--out", misnamed.parent)
    assert misnamed.read_bytes() == text.read_bytes()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "is read-only: name another --out" in refusal("--input", text, "--out", folder)


class Attack:
    def __reduce__(self):
        return Path.touch, (Path("attacked"),)


def damaged(checkpoint):
    """Broken variants of a good checkpoint, each under what should be said of it."""
    config, weights = checkpoint["config"], checkpoint["model"]
    head = weights["lm_head.weight"]

    def with_config(**sizes):
        return checkpoint | {"config": config | sizes}

    def with_head(value):
        return checkpoint | {"model": weights | {"lm_head.weight": value}}

    yield "neither ours (config,", {key: checkpoint[key] for key in ("config", "vocab", "model")}
    yield "not a dict", [checkpoint]
    yield "unexpected keyword argument 'n_heads'", with_config(n_heads=1)
    yield "make no sense", with_config(n_head=2)
    for size in (0, 10**12, 1 << 20):
        yield "make no sense", with_config(n_layer=size)
    for size in (True, "8", torch.zeros(1).expand(1 << 40)):
        yield "not numbers", with_config(dropout=size)
    yield "vocab_size characters", checkpoint | {"vocab": checkpoint["vocab"][::-1]}
    without_bias = {name: value for name, value in weights.items() if name != "ln_f.bias"}
    yield 'Missing key(s) in state_dict: "ln_f.bias"', checkpoint | {"model": without_bias}
    yield (
        'Unexpected key(s) in state_dict: "more"',
        checkpoint | {"model": weights | {"more": head}},
    )
    yield 'Missing key(s) in state_dict: "blocks.1', with_config(n_layer=2)
    yield "asks for many more weights", with_config(n_layer=9)
    yield "size mismatch for lm_head.weight", with_head(torch.cat((head, head)))
    yield "_rebuild_sparse_tensor", with_head(head.to_sparse())
    yield "_rebuild_meta_tensor", with_head(head.to("meta"))
    yield "not a tensor of floats", with_head(head.long())
    yield "not a tensor of floats", with_head(head.tolist())
    overflowing = {name: (40 * value).half() for name, value in weights.items()}
    yield "--precision float32", checkpoint | {"model": overflowing}
    for value in (torch.nan, torch.inf, 1e30):
        yield "enormous", with_head(head.clone().fill_diagonal_(value))
    yield "make no sense", with_config(block_size=1 << 14)
    yield (
        "larger than the file",
        checkpoint
        | {
            "config": config | {"block_size": 1 << 12},
            "model": weights | {"position_embedding.weight": torch.zeros(1, 1).expand(1 << 12, 65)},
        },
    )
    for value in (Attack(), bytearray(10)):
        yield "more than tensors", checkpoint | {"training": value}


def test_damaged_weights_are_refused_and_run_nothing(grown, refusal, tmp_path, monkeypatch):
    folder, _ = grown
    monkeypatch.chdir(tmp_path)
    good = (folder / "one-block.pt").read_bytes()
    cut_off = "it is damaged, or not as torch.save writes it"
    files = [(cut_off, b""), (cut_off, good[: len(good) // 2]), (cut_off, b"not a checkpoint")]
    for message, checkpoint in damaged(torch.load(io.BytesIO(good), weights_only=True)):
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        files.append((message, buffer.getvalue()))
    path = tmp_path / "damaged.pt"
    for message, content in files:
        path.write_bytes(content)
        assert message in refusal("sample", "--weights", path)
    assert not Path("attacked").exists()
