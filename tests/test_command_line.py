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
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import SCRIPT
from hypothesis import given, settings
from hypothesis import strategies as st
from nbclient import NotebookClient


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


def test_growth_prints_a_table_and_samples_and_keeps_the_last_model(grown):
    folder, result = grown
    output = result.stdout.decode()
    table, samples, text = (part.splitlines() for part in re.split(r"\n\n\d+ characters", output))
    rows = [line.split() for line in table[3:]]
    rungs = ["counting", "bigram", "position", "attention", "feed-forward", "block"]
    assert [row[:2] for row in rows] == [[str(i), rung] for i, rung in enumerate(rungs)]
    vocab = "".join(sorted(set((folder / "text.txt").read_text(encoding="utf-8"))))
    parameters, train_loss, val_loss = (float(n.replace(",", "")) for n in rows[-1][-3:])
    assert parameters == 60_515 - 65 * 65 - 66 * 65 + len(vocab) * (65 + 66)
    training = torch.load(folder / "one-block.pt", weights_only=True)["training"]
    assert (train_loss, val_loss) == pytest.approx(
        (training["train_loss"], training["val_loss"]), abs=1e-4
    )
    assert training["step"] == 40 and training["seed"] == 5 and training["text"] == "text.txt"
    assert [line[:15].strip() for line in samples[2:]] == [line[:15].strip() for line in table[4:]]
    assert all(len(line) == 15 + 60 and set(line[15:]) <= {*vocab, "↵"} for line in samples[2:])
    assert text[0] == " from the last model:" and len("\n".join(text[2:])) >= 499
    assert (folder / "growth.png").read_bytes().startswith(b"\x89PNG")
    files = ["growth.png", "one-block.pt", "text.txt"]
    assert sorted(path.name for path in folder.iterdir()) == files
    wrote = f"wrote one-block.pt and growth.png to {folder}"
    assert result.stderr.decode().splitlines() == [wrote]  # no bars: no terminal


def test_the_same_seed_grows_the_same(grown, tmp_path):
    folder, first = grown
    options = "--input", folder / "text.txt", "--steps", 40, "--seed", 5, "--out", tmp_path
    assert run("grow", *options).stdout == first.stdout
    assert (tmp_path / "growth.png").read_bytes() == (folder / "growth.png").read_bytes()


def test_evaluate_confirms_what_the_file_claims(grown):
    folder, _ = grown
    result = run("evaluate", "--weights", folder / "one-block.pt", "--input", folder / "text.txt")
    assert result.returncode == 0
    rows = [line.split() for line in result.stdout.decode().splitlines()[1:]]
    assert [row[0] for row in rows] == ["train", "validation"]
    for measured, claimed, bits, perplexity in (row[1:] for row in rows):
        assert measured == claimed
        assert 2 ** float(bits) == pytest.approx(float(perplexity), abs=1e-3)
        assert math.log(float(perplexity)) == pytest.approx(float(measured), abs=1e-4)


AS_ON_MACOS = """
import multiprocessing, runpy, sys
multiprocessing.set_start_method("spawn")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_nothing_is_left_to_warn_of_at_the_end(grown, tmp_path):
    folder, _ = grown
    grow = "grow", "--steps", 1, "--out", tmp_path
    evaluate = "evaluate", "--weights", folder / "one-block.pt"
    for action in (grow, evaluate):
        options = *action, "--input", folder / "text.txt"
        result = run("-c", AS_ON_MACOS, SCRIPT, *options, script="-B")
        lines = result.stderr.decode().splitlines()
        assert result.returncode == 0 and all(line.startswith("wrote ") for line in lines)


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
    assert b"error: 'utf-8' codec" in run(*options, input=b"caf\xe9").stderr


@pytest.mark.skipif(sys.platform == "win32", reason="sh is of Unix")
def test_growth_ends_when_its_reader_has_seen_enough(grown):
    folder, _ = grown
    command = [sys.executable, SCRIPT, "--input", folder / "text.txt", "--out", folder]
    piped = f"{shlex.join(map(str, command))} 2>&1 | head -n 4"
    subprocess.run(piped, shell=True, check=True, stdout=subprocess.DEVNULL, timeout=60)


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
def test_a_full_disk_loses_no_earlier_file(grown, tmp_path):
    folder, _ = grown
    before = (tmp_path / "one-block.pt").write_bytes(b"earlier")
    options = "--input", folder / "text.txt", "--steps", 2, "--out", tmp_path
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    limited = ["bash", "-c", 'ulimit -f 100; trap "" XFSZ; exec "$@"', "bash", *command]
    result = subprocess.run(limited, capture_output=True, timeout=100)
    assert result.returncode == 2 and b"File too large" in result.stderr
    assert result.stderr.count(b"\n") == 1
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [before]


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
    rows = [line.split()[1] for line in output.splitlines()[3:]]
    assert rows == ["counting", "bigram", "position"]
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to send")
def test_ctrl_c_keeps_the_text_that_is_drawn(grown):
    folder, _ = grown
    options = "--weights", folder / "one-block.pt", "--tokens", 10**6, "--prompt", "far"
    assert interrupted(["sample", *options], b"far", -signal.SIGINT).startswith("far")


@pytest.mark.parametrize(
    "options, message",
    [
        (["sample", "--prompt", "Zoë"], "never saw 'Zë'"),
        (["sample", "--tokens", "0"], "--tokens 0: it must be from 1 to"),
        (["sample", "--samples", "257"], "--samples 257: it must be from 1 to 256"),
        (["sample", "--top-k", "0"], "--top-k 0: it must be from 1 to"),
        (["sample", "--top-k", "many"], "argument --top-k: invalid int value: 'many'"),
        (["sample", "--temperature", "-1"], "--temperature -1.0: it must be from 0 to"),
        (["sample", "--temperature", "nan"], "--temperature nan: it must be from 0 to"),
        (["sample", "--seed", str(2**64)], "--seed 18446744073709551616: it must be from 0 to"),
        (["sample", "--weights", "none.pt"], "no file none.pt: train a model first"),
        (["sample", "--prompt", "-x"], "argument --prompt: expected one argument; before a dash"),
        (["sample", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["grow", "--tokens", "5"], "unrecognized arguments: --tokens 5"),
        (["--steps", "0"], "--steps 0: it must be from 1 to"),
        (["train"], "invalid choice: 'train'"),
    ],
)
def test_a_mistyped_option_is_named(grown, refusal, options, message):
    folder, _ = grown
    weights = ["--weights", folder / "one-block.pt"] if options[0] == "sample" else []
    assert message in refusal(*options[:1], *weights, *options[1:])


known = st.text("far away", max_size=20)
whole = st.integers(1, 20) | st.integers(-1, 2**70)


@settings(max_examples=50)
@given(
    prompt=(known | st.text(max_size=9)).filter(lambda text: text not in ("-", "--")),
    tokens=st.integers(1, 9) | st.integers(-1, 0),
    temperature=st.floats(0, 9) | st.floats(),
    top_k=whole,
    seed=whole,
)
def test_sampling_does_what_the_options_say_or_refuses_them(
    gpt, grown, prompt, tokens, temperature, top_k, seed
):
    weights = grown[0] / "one-block.pt"
    options = f"--prompt={prompt}", f"--tokens={tokens}", f"--temperature={temperature}"
    options += f"--top-k={top_k}", f"--seed={seed}", f"--weights={weights}"
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        status = gpt.main(["sample", *options])
    out, err, vocab = out.getvalue(), err.getvalue(), set(gpt.load(weights)[1])
    assert err.count("\n") == 1
    fits = set(prompt) <= vocab and tokens > 0 and 0 <= temperature <= 2**32
    if fits and 1 <= top_k <= 2**32 and 0 <= seed <= 2**32:
        assert status == 0 and out.startswith(prompt) and len(out) == len(prompt) + tokens
    else:
        assert (status, out) == (2, "") and err.startswith("error: ")


@pytest.mark.parametrize("action", ["grow", "sample", "evaluate"])
def test_each_action_has_a_help_of_its_own(action):
    text = run(action, "--help").stdout.decode()
    assert f" {action} [-h]" in text and ("--tokens" in text) == (action == "sample")


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file"),
        (b"", "0 characters, too few"),
        (b"caf\xe9" * 100, "not UTF-8"),
        (b"a" * 80, "needs 81 or more"),
    ],
)
def test_bad_texts(refusal, tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert message in refusal("--input", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_is_no_text_and_no_weights(refusal, tmp_path):
    assert tmp_path.name in refusal("--input", tmp_path, "--out", tmp_path / "out")
    assert "no file" in refusal("sample", "--weights", tmp_path)


def test_a_model_that_cannot_replace_another_file_is_kept_under_its_own_name(grown, tmp_path):
    (tmp_path / "one-block.pt").mkdir()  # as if Windows refused it, since the file is open
    options = "--input", grown[0] / "text.txt", "--steps", 1, "--out", tmp_path
    result = run(*options)
    line = refused(result.returncode, "", result.stderr.decode())
    kept = re.search("cannot replace .*one-block.pt .*: the new one is (.*)", line.rstrip())[1]
    assert run("sample", "--weights", kept, "--tokens", 1).returncode == 0


NO_NETWORK = os.environ | {"https_proxy": "http://127.0.0.1:9"}


def test_without_network_and_text_it_grows_on_what_the_large_model_wrote(grown, tmp_path):
    folder, _ = grown
    script, more = shutil.copy(SCRIPT, tmp_path), tmp_path / "assets" / "more.txt"
    more.parent.mkdir()
    shutil.copy(folder / "text.txt", more)
    result = run("--steps", 5, script=script, cwd=tmp_path, env=NO_NETWORK)
    assert result.returncode == 0
    size = len(more.read_text(encoding="utf-8"))
    assert result.stdout.decode().startswith(f"more.txt: {size:,} characters")
    warnings = result.stderr.decode().splitlines()[:2]
    assert all(line.startswith("WARNING: ") for line in warnings)
    for part in ("tinyshakespeare/input.txt", f"save it yourself as {tmp_path / 'input.txt'}"):
        assert part in warnings[0]
    assert f"using {more}" in warnings[1]
    assert not (tmp_path / "input.txt").exists()
    options = "evaluate", "--weights", "one-block.pt"  # on a text that the user did not ask for?
    assert run(*options, script=script, cwd=tmp_path, env=NO_NETWORK).returncode == 2


def test_a_clone_with_neither_network_nor_texts_nor_weights(tmp_path):
    script = shutil.copy(SCRIPT, tmp_path)
    result = run(script=script, cwd=tmp_path, env=NO_NETWORK)
    assert result.returncode == 2 and b"Traceback" not in result.stderr
    assert b"cannot download" in result.stderr and b"more.txt" in result.stderr
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
    assert "text.txt" in refusal("--input", text, "--out", text / "below")
    assert "text.txt" in refusal("--input", text, "--out", text)

    def read_only(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", read_only)
    assert "Permission denied" in refusal("--input", text, "--out", folder)


def test_run_in_a_notebook_neither_ends_nor_changes_the_kernel(grown):
    folder, _ = grown
    sample = f'sample --weights "{folder}/one-block.pt" --tokens 20 --prompt far'
    cells = [
        "import signal, torch\nbefore = signal.getsignal(signal.SIGINT), torch.get_num_threads()",
        f'%run "{SCRIPT}" {sample}',
        f'%run "{SCRIPT}" {sample} --top-k 0',
        f'%run "{SCRIPT}" grow --steps 1 --input "{folder}/text.txt" --out "{folder}"',
        "print((signal.getsignal(signal.SIGINT), torch.get_num_threads()) == before)",
    ]
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)))
    NotebookClient(notebook, timeout=60).execute()
    outputs = ["".join(o.get("text", "") for o in cell.outputs) for cell in notebook.cells]
    assert re.search("far.{20}", outputs[1], re.S) and "error: --top-k 0" in outputs[2]
    assert "500 characters" in outputs[3] and outputs[4] == "True\n"


def test_a_shell_without_a_real_stdout_goes_on(grown):
    """As IDLE: its stream has no `reconfigure`, and its process must not end."""
    folder, _ = grown
    shell = "import io, runpy, sys; sys.stdout = io.StringIO(); sys.argv = sys.argv[1:]\n"
    shell += "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    shell += "sys.__stdout__.write(sys.stdout.getvalue() + 'still here')"
    options = "--weights", folder / "one-block.pt", "--tokens", 9
    result = run("-c", shell, SCRIPT, "sample", *options, script="-B")
    assert result.returncode == 0
    assert re.fullmatch(b"(\r\n|.){9}still here", result.stdout, re.S)


def test_a_damaged_model_says_what_does_not_fit(grown, refusal, tmp_path):
    folder, _ = grown
    checkpoint = torch.load(folder / "one-block.pt", weights_only=True)
    config, weights = checkpoint["config"], checkpoint["model"]
    without = {name: value for name, value in weights.items() if name != "lm_head.bias"}
    overflowing = {name: (40 * value).half() for name, value in weights.items()}
    for message, parts in (
        ("unexpected keyword argument 'n_heads'", {"config": config | {"n_heads": 1}}),
        ("must be a multiple of n_head", {"config": config | {"n_head": 2}}),
        ('Missing key(s) in state_dict: "blocks.1', {"config": config | {"n_layer": 2}}),
        ('Missing key(s) in state_dict: "lm_head.bias"', {"model": without}),
        ("the text has 3: see --input", {"vocab": "abc"}),
        ("try --precision float32", {"model": overflowing}),
    ):
        torch.save(checkpoint | parts, tmp_path / "other.pt")
        assert message in refusal("sample", "--weights", tmp_path / "other.pt")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_pipe_gets_utf_8_and_a_terminal_what_it_can_show(grown, tmp_path, encoding):
    text = tmp_path / "Bücher €.txt"
    text.write_text("Zoë paid 5 € for 😀\n" * 20, encoding="utf-8")
    environment = {"env": os.environ | {"PYTHONIOENCODING": encoding}}
    result = run("--input", text, "--steps", 1, "--out", tmp_path, **environment)
    assert result.returncode == 0
    options = "sample", "--weights", tmp_path / "one-block.pt", "--prompt", "Zoë 😀", "--tokens", 1
    assert run(*options, **environment).stdout.startswith("Zoë 😀".encode())

    pty = pytest.importorskip("pty", reason="Windows has no pseudo-terminals of this kind")
    reader, terminal = pty.openpty()
    command = [sys.executable, SCRIPT, *map(str, options)]
    subprocess.run(command, check=True, stdout=terminal, stderr=subprocess.DEVNULL, **environment)
    assert os.read(reader, 100).startswith("Zoë 😀".encode(encoding, errors="replace"))
