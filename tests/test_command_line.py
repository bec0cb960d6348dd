"""The script as people run it: its output, its files and its answers to mistakes."""

import contextlib
import hashlib
import io
import math
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import SCRIPT, gpt, some_text

COMMAND, PIPES = [sys.executable, str(SCRIPT)], dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(*args, command=COMMAND, **options):
    return subprocess.run([*command, *map(str, args)], timeout=99, **PIPES | options)


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A folder in which the script has trained its models for 40 steps on a text of our own."""
    folder = tmp_path_factory.mktemp("grown")
    (folder / "text.txt").write_text(some_text(900), encoding="utf-8")
    result = run("--input", "text.txt", "--steps", 40, "--seed", 5, cwd=folder)
    assert result.returncode == 0, result.stderr.decode()
    return folder, result


@pytest.fixture
def call(grown, monkeypatch, capfd):
    """A function that runs a command line in the grown folder: exit status, stdout, stderr."""
    monkeypatch.chdir(grown[0])
    monkeypatch.setattr(gpt, "WEIGHTS", grown[0] / "one-block.pt")
    return lambda *args: (gpt.main(list(map(str, args))), *capfd.readouterr())


def test_growth_prints_a_table_and_samples_and_writes_two_files(grown):
    folder, result = grown
    table, samples, text = re.split(r"\n\n\d+ characters.*\n\n", result.stdout.decode())
    rows, samples = table.splitlines()[3:], samples.splitlines()
    names = ["1 bigram", "2 position", "3 attention", "4 feed-forward", "5 block"]
    assert [row[:14].strip() for row in rows] == ["0 counting", *names]
    assert [line[:14].strip() for line in samples] == names
    assert all(len(line) == 15 + 60 for line in samples) and len(text) == 501
    training = torch.load(folder / "one-block.pt", weights_only=True)["training"]
    assert [training[key] for key in ("step", "seed", "text")] == [40, 5, "text.txt"]
    size = 60_515 - (65 + 66) * (65 - len(set(some_text(900))))  # rows of embedding and lm_head
    losses = training["train_loss"], training["val_loss"]
    assert rows[-1].endswith("{:>10,} {:8.4f} {:8.4f}".format(size, *losses))
    assert (folder / "growth.png").read_bytes().startswith(b"\x89PNG")
    [line] = result.stderr.splitlines()  # no bars: no terminal
    assert line.startswith(b"wrote one-block.pt") and line.endswith(folder.name.encode())


def test_the_same_seed_grows_the_same_models_and_prints_utf_8_though_ascii_is_set(grown, tmp_path):
    folder, first = grown
    options = "grow", "--input", folder / "text.txt", "--steps", 40, "--seed", 5, "--out", tmp_path
    again = run(*options, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert again.stdout == first.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["growth.png", "one-block.pt"]
    assert (tmp_path / "growth.png").read_bytes() == (folder / "growth.png").read_bytes()


def test_a_rung_that_people_insert_is_grown_and_changes_no_other(grown, tmp_path):
    folder, first = grown
    last = '    Rung("block",'
    inserted = '    Rung("twice", "talk twice", lambda c: Model(c, 2 * [CausalSelfAttention])),\n'
    script = SCRIPT.read_text(encoding="utf-8")
    assert script.count(last) == 1
    (tmp_path / "grow.py").write_text(script.replace(last, inserted + last), encoding="utf-8")
    options = "--input", folder / "text.txt", "--steps", 40, "--seed", 5
    result = run(tmp_path / "grow.py", *options, command=[sys.executable], cwd=tmp_path)
    rows, before = (each.stdout.decode().splitlines() for each in (result, first))
    assert rows[:8] == before[:8]  # up to rung 4
    assert rows[8].startswith("5 twice        talk twice")
    assert rows[9] == before[8].replace("5 block", "6 block")
    assert (tmp_path / "one-block.pt").read_bytes() == (folder / "one-block.pt").read_bytes()


def test_evaluate_confirms_what_the_file_claims_and_ends_without_a_warning(grown):
    as_on_macos = """import multiprocessing, runpy, sys; multiprocessing.set_start_method("spawn")
sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__")"""
    options = "--weights", grown[0] / "one-block.pt", "--input", grown[0] / "text.txt"
    result = run(SCRIPT, "evaluate", *options, command=(sys.executable, "-c", as_on_macos))
    assert (result.returncode, result.stderr) == (0, b"")
    rows = result.stdout.decode().splitlines()[1:]
    for row, part in zip(rows, ("train", "val"), strict=True):
        loss, claimed, bits = map(float, row.removeprefix(part).split())
        assert loss == pytest.approx(claimed, abs=2e-4)
        assert 2**bits == pytest.approx(math.exp(loss), rel=1e-3)


def test_sample_continues_the_prompt_by_as_many_characters_as_asked(call):
    for prompt in ("", "far", "far away, and far away, and"):  # none, short, beyond the window
        options = "sample", "--prompt", prompt, "--tokens", 30, "--seed", 3
        status, out, err = call(*options)
        assert status == 0 and out.startswith(prompt) and len(out) == len(prompt) + 30
        assert re.fullmatch(r"\n[\d,]+ characters per second, seed 3\n", err)
        assert call(*options)[1] == out != call(*options[:-1], 4)[1]
        assert call(*options, "--temperature", 0.8, "--top_k", 0)[1] == out  # the defaults
    assert call("sample", "--temperature", 0)[1] == call("sample", "--top-k", 1)[1]
    assert call("sample")[1] != call("sample")[1]  # another seed each time
    texts = call("sample", "--samples", 2, "--tokens", 9, "--prompt", "far", "--seed", 3)[1]
    first, second = texts.split(f"\n{40 * '-'}\n")
    assert len(first) == len(second) == 12 and first[:3] == second[:3] == "far" and first != second


def test_a_prompt_from_stdin_is_utf_8_with_any_line_ends(grown):
    options = "sample", "--weights", grown[0] / "one-block.pt", "--tokens", 1, "--prompt", "-"
    result = run(*options, input=b"\xef\xbb\xbfaway,\r\n" + "€".encode())
    assert result.stdout.startswith("away,\n€".encode()) and len(result.stdout.decode()) == 8
    assert b"error: 'utf-8' codec" in run(*options, input=b"caf\xe9").stderr


def test_a_closed_pipe_ends_sampling_quietly(grown):
    options = "sample", "--weights", grown[0] / "one-block.pt", "--tokens", "999999"
    with subprocess.Popen([*COMMAND, *options], **PIPES) as process:
        process.stdout.read(9)
        process.stdout.close()
        assert process.wait(timeout=20) == 141 and process.stderr.read() == b""


def test_an_ascii_terminal_gets_question_marks_and_ctrl_c_ends_sampling_quietly(grown):
    pty = pytest.importorskip("pty", reason="Windows has no pseudo-terminals of this kind")
    reader, terminal = pty.openpty()
    options = "sample", "--weights", grown[0] / "one-block.pt", "--tokens", "999999"
    pipes = PIPES | dict(stdout=terminal, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    with subprocess.Popen([*COMMAND, *options, "--prompt", "Zoë"], **pipes) as process:
        os.close(terminal)  # then reading ends when the process does
        shown = os.read(reader, 3) + os.read(reader, 1)
        process.send_signal(signal.SIGINT)
        os.close(reader)  # a process that ignores the signal ends, too: it can no longer write
        assert (shown[:3], process.wait(20), process.stderr.read()) == (b"Zo?", -signal.SIGINT, b"")


def test_a_python_shell_streams_and_keeps_its_process_threads_and_signals(call, monkeypatch, capfd):
    monkeypatch.setattr(os, "_exit", pytest.fail)
    monkeypatch.setattr(sys, "stdout", shown := io.StringIO())  # as in IDLE, not a real file
    shown.flush = Mock()
    torch.set_num_threads(3)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", Mock(side_effect=KeyboardInterrupt))
    sample, before = "sample --weights one-block.pt --tokens 300", signal.getsignal(signal.SIGINT)
    for line in ("grow --steps 1 --input text.txt --out shell", sample, "sample --tokens 0"):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *line.split()])
        with contextlib.suppress(KeyboardInterrupt):  # growth is stopped at its picture
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert (torch.get_num_threads(), signal.getsignal(signal.SIGINT)) == (3, before)
    torch.set_num_threads(1)
    assert "5 block" in shown.getvalue()
    assert shown.flush.call_count > 300  # for each character when it is drawn
    assert "error: argument --tokens: must be" in capfd.readouterr().err


def test_without_network_it_grows_on_what_the_large_model_wrote(call, monkeypatch, tmp_path):
    assert len(gpt.read_text(gpt.FALLBACK)) == 500_000
    monkeypatch.setattr(gpt, "TEXT", tmp_path / "input.txt")
    monkeypatch.setattr(gpt, "URL", "http://127.0.0.1:9/input.txt")
    monkeypatch.setattr(gpt, "FALLBACK", Path("text.txt"))
    status, out, err = call("--steps", 1, "--out", tmp_path)
    assert status == 0 and out.startswith(f"text.txt: {len(some_text(900)):,} characters")
    assert "using text.txt" in err and f"save it yourself as {tmp_path / 'input.txt'}" in err
    assert "error: cannot download" in call("evaluate")[2]  # it measures on no other text


def test_training_without_a_loss_ends_in_one_line(call, monkeypatch, tmp_path):
    monkeypatch.setattr(gpt, "LEARNING_RATE", 1e9)
    status, _, err = call("--input", "text.txt", "--steps", 30, "--out", tmp_path)
    assert status == 2 and not list(tmp_path.iterdir())
    assert re.fullmatch(r"error: no loss at step \d+ \(1 bigram\): lower LEARNING_RATE\n", err)


MISTAKES = {
    "sample --prompt Chloé": "the prompt has 'Clé', the model only knows '",
    "sample --tokens 0": "argument --tokens: must be from 1 to 4,294,967,296, not 0 (see --help",
    "sample --temperature nan": "--temperature must be 0, or from 0.01 to 100",
    "sample --weights none.pt": "No such file or directory: 'none.pt'",
    "sample --weights cut.pt": "cut.pt is damaged, or has Python objects: save model.state_dict()",
    "sample --weights shape.pt": "cannot use shape.pt: Error(s) in loading",
    "sample --weights nan.pt": "these weights give logits that are not finite",
    "--input none.txt": "No such file or directory: 'none.txt'",
    "--input short.txt": "short.txt has 80 characters, but needs 81 or more",
    "--input many.txt": "many.txt has 10,001 different characters: 10,000 at most",
    "--input latin-1.txt": "latin-1.txt is not UTF-8: convert it",
    "evaluate --input digits.txt": "digits.txt has '012346789', the model only knows '",
}


@pytest.fixture(scope="module")
def bad_files(grown):
    """The folder, with texts and checkpoints that people may have."""
    folder, good = grown[0], torch.load(grown[0] / "one-block.pt", weights_only=True)
    for name, content in {
        "short.txt": b"a" * 80, "latin-1.txt": b"caf\xe9" * 99, "digits.txt": b"0123456789" * 20,
        "cut.pt": (folder / "one-block.pt").read_bytes()[:-1],
        "many.txt": "".join(map(chr, range(0x10000, 0x10000 + 10_001))).encode(),
        "shape.pt": {"config": good["config"] | {"n_embd": 66}},
        "nan.pt": {"model": {name: math.nan * value for name, value in good["model"].items()}},
    }.items():  # fmt: skip
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            torch.save(good | content, folder / name)
    return folder


@pytest.mark.parametrize("line, message", MISTAKES.items())
def test_a_mistake_gets_one_line_that_says_what_is_wrong(call, bad_files, line, message):
    before = {path: path.stat().st_mtime_ns for path in bad_files.iterdir()}
    status, out, err = call(*line.split())
    assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert message in err
    assert {path: path.stat().st_mtime_ns for path in bad_files.iterdir()} == before


def test_the_whole_text_is_fetched_once_or_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(gpt, "TEXT", path := tmp_path / "input.txt")
    monkeypatch.setattr(gpt, "SHA256", hashlib.sha256(b"the text").hexdigest())
    for result, message in (
        (io.BytesIO(b"the t"), "cannot download https://raw.*another text .* as .*input.txt"),
        (OSError("timed out"), "cannot download https://raw.*timed out.* as .*input.txt"),
    ):
        monkeypatch.setattr(gpt, "urlopen", Mock(side_effect=[result]))
        with pytest.raises(ConnectionError, match=message):
            gpt.read_text(path)
        assert not list(tmp_path.iterdir())
    monkeypatch.setattr(gpt, "urlopen", Mock(side_effect=[io.BytesIO(b"the text")]))
    assert gpt.read_text(path) == gpt.read_text(path) == "the text"  # then it is there
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"the text"]
    path.write_bytes(b"\xef\xbb\xbfmy text")
    assert gpt.read_text(path) == "my text"


def test_a_full_disk_loses_no_earlier_file_and_leaves_no_other(grown, tmp_path):
    resource = pytest.importorskip("resource", reason="Windows cannot limit the size of a file")
    (tmp_path / "one-block.pt").write_bytes(b"earlier")
    options = "--input", grown[0] / "text.txt", "--steps", 1, "--out", tmp_path
    limits = 50_000, 50_000  # bytes: the weights have 230,000
    result = run(*options, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    assert result.returncode == 2 and result.stderr == b"error: [Errno 27] File too large\n"
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"earlier"]
