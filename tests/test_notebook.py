"""The notebook: its model is the script's, its training survives anything, its outputs are real."""

import ast
import hashlib
import io
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import traceback
import warnings
from contextlib import redirect_stdout
from types import SimpleNamespace

import nbformat
import pytest
import torch
from conftest import SCRIPT
from nbclient import NotebookClient

NOTEBOOK = SCRIPT.with_name("model.ipynb")
TINY = dict(block_size=16, n_layer=2, n_head=2, n_embd=32, batch_size=4, iterations=30)
TINY |= dict(eval_interval=10, dropout=0.1, precision="bfloat16")


def read_notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_of(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(notebook):
    """All outputs in order, and the text that was printed among them."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return outputs, "".join(output.get("text", "") for output in outputs)


def place_of_parameters(notebook):
    return [cell.metadata.get("tags") for cell in notebook.cells].index(["parameters"])


def settings_of(notebook, cuda):
    """What the cell of parameters sets on a machine with or without a GPU."""
    names = {"torch": SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: cuda))}
    exec(notebook.cells[place_of_parameters(notebook)].source, names)
    return names


# No window, no network, no more threads than such a small model needs.
QUIET = {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "https_proxy": "http://127.0.0.1:1"}


@pytest.fixture
def tiny(tmp_path):
    """A function that gives the notebook with a text of our own and small settings, or others."""
    words = ["I went", "to", "the", "gym", "today", "and", "far", "away,\n"]
    (tmp_path / "text.txt").write_text(" ".join(random.Random(1).choices(words, k=1000)))
    paths = dict(text_path="text.txt", checkpoint_dir="kept", weights_path="weights.pt")
    paths = {name: str(tmp_path / path) for name, path in paths.items()}

    def build(**others):
        notebook = read_notebook()
        given = TINY | paths | others
        assert given.keys() <= settings_of(notebook, cuda=False).keys()
        cell = nbformat.v4.new_code_cell("\n".join(f"{k} = {v!r}" for k, v in given.items()))
        notebook.cells.insert(place_of_parameters(notebook) + 1, cell)
        return notebook

    return build


@pytest.fixture
def train(tiny, tmp_path, monkeypatch):
    """A function that runs the cells, with `patch` before the training, and returns what came.

    A patch that could harm this process (it has a signal or a limit) gets a process of its own.
    """

    def run(patch="", again=False, **others):
        sources = code_of(tiny(**others))
        place = next(
            i for i, source in enumerate(sources) if "train(run, checkpoint_path)" in source
        )
        if again:
            first_time = textwrap.indent(sources[place], "    ")
            patch += f"try:\n{first_time}\nexcept KeyboardInterrupt:\n    pass"
        source = "\n".join([*sources[:place], patch, *sources[place:]])
        if "import signal" in patch or "import resource" in patch:
            (tmp_path / "cells.py").write_text(source)
            return subprocess.run(
                [sys.executable, "cells.py"], cwd=tmp_path, capture_output=True, text=True,
                timeout=100, env=QUIET,
            )  # fmt: skip
        for name, value in QUIET.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        sys.modules["notebook"] = type(sys)("notebook")  # where @dataclass looks
        stdout, stderr = io.StringIO(), ""
        with redirect_stdout(stdout), warnings.catch_warnings(action="ignore"):
            try:
                exec(compile(source, "cells.py", "exec"), {"__name__": "notebook"})
            except Exception:
                stderr = traceback.format_exc()
        return SimpleNamespace(
            returncode=int(stderr != ""), stdout=stdout.getvalue(), stderr=stderr
        )

    return run


@pytest.fixture
def definitions():
    """The names that the notebook's imports, classes and functions define, and nothing run."""
    kinds = ast.Import | ast.ImportFrom | ast.ClassDef | ast.FunctionDef
    body = [node for source in code_of(read_notebook())
            for node in ast.parse(source).body if isinstance(node, kinds)]  # fmt: skip
    names = {"__name__": "notebook"}
    sys.modules["notebook"] = type(sys)("notebook")  # where @dataclass looks
    exec(compile(ast.Module(body, []), NOTEBOOK.name, "exec"), names)
    return names


# ---------------------------------------------------------------------------------- the same model


@pytest.mark.parametrize("sizes", [(65, 8, 1, 1, 65), (7, 16, 2, 4, 32), (30, 5, 3, 1, 12)])
def test_notebook_and_script_give_the_same_logits(gpt, definitions, sizes):
    config = gpt.Config(*sizes, dropout=0.2)
    ours = gpt.initialize(gpt.gpt(config), seed=1).eval()
    theirs = definitions["GPT"](definitions["Config"](*sizes, dropout=0.2)).eval()
    theirs.load_state_dict(ours.state_dict())
    idx = torch.randint(sizes[0], (3, sizes[1]))
    torch.testing.assert_close(theirs(idx), ours(idx), atol=1e-4, rtol=0)


def test_the_settings_are_the_specification(definitions):
    settings = settings_of(read_notebook(), cuda=True)
    names = "batch_size block_size iterations n_embd n_head n_layer dropout attention_dropout"
    assert [settings[name] for name in names.split()] == [64, 256, 5000, 384, 6, 6, 0.2, 0.2]
    sizes = [settings[name] for name in ("block_size", "n_layer", "n_head", "n_embd", "dropout")]
    model = definitions["GPT"](definitions["Config"](65, *sizes))
    assert sum(parameter.numel() for parameter in model.parameters()) == 10_788_929


def test_attention_maps_are_the_weights_with_which_attention_mixes(definitions):
    model = definitions["GPT"](definitions["Config"](30, 16, 2, 4, 32, dropout=0.2)).eval()
    idx, second = torch.randint(30, (10,)), model.blocks[1]
    maps = definitions["attention_maps"](model, idx, 1)  # (4, 10, 10)
    x = model.token_embedding(idx) + model.position_embedding.weight[:10]
    x = second.ln1(model.blocks[0](x[None]))  # (1, 10, 32)
    values = second.attention.qkv(x)[0, :, 64:].view(10, 4, 8).transpose(0, 1)  # (4, 10, 8)
    mixed = (maps @ values).transpose(0, 1).reshape(10, 32)
    torch.testing.assert_close(second.attention.proj(mixed), second.attention(x)[0])


# ---------------------------------------------------------------------------------------- the whole


def test_the_notebook_runs_and_the_script_loads_what_it_saves(
    gpt, tiny, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = tiny()
    notebook.cells.insert(0, nbformat.v4.new_code_cell("import socket\nsocket.getaddrinfo = None"))
    NotebookClient(notebook, timeout=100).execute()
    _, printed = outputs_of(notebook)
    weights = tmp_path / "weights.pt"
    _, _, training = gpt.load(weights)
    assert training["interim"] and training["recipe"] == "ours" and training["step"] in (10, 20, 30)
    losses = [f"{training[key]:.4f}" for key in ("train_loss", "val_loss")]
    assert re.search(f"best, stored +{training['step']} +{losses[0]} +{losses[1]}", printed)
    for picture in ("losses", "attention"):
        assert (tmp_path / f"kept/ours-1.{picture}.png").read_bytes().startswith(b"\x89PNG")

    text = tmp_path / "text.txt"
    assert gpt.main(["evaluate", "--weights", str(weights), "--input", str(text)]) == 0
    rows = [line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [[loss, loss] for loss in losses]
    prompt = ["--prompt", "I went to the gym today", "--tokens", "50"]
    assert gpt.main(["sample", "--weights", str(weights), *prompt]) == 0


# ------------------------------------------------------------------------------------ interruptions

KILLED_AT_STEP = """
import signal
advance_alive = advance
def advance(run):
    if run.step == {}:
        os.kill(os.getpid(), signal.SIGKILL)
    advance_alive(run)
"""

KILLED_IN_SAVE = """
import signal
fsync, saves = os.fsync, [None] * {}
def die_with_half_a_file(number):
    saves.pop()
    if saves:
        return fsync(number)
    os.ftruncate(number, os.fstat(number).st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)
os.fsync = die_with_half_a_file
"""


def test_killed_training_goes_on_to_the_same_result(train, tmp_path):
    kept, weights = tmp_path / "kept/ours-1.pt", tmp_path / "weights.pt"
    assert train().returncode == 0
    at_once, weights_at_once = torch.load(kept), torch.load(weights)["model"]
    kept.unlink()
    steps = []
    for patch in (
        KILLED_AT_STEP.format(7),  # before the first checkpoint
        KILLED_IN_SAVE.format(1),
        KILLED_IN_SAVE.format(2),
        KILLED_AT_STEP.format(25),
        KILLED_IN_SAVE.format(3),  # the save of the weights, after the picture's
        "",
    ):
        done = train(patch)
        assert done.returncode == (-signal.SIGKILL if patch else 0), done.stderr
        steps += map(int, re.findall(r"stands at step (\d+)", done.stdout))
    assert steps == [10, 20, 30]
    assert not list(tmp_path.rglob("*.new"))  # what the killed ones left is gone
    in_parts = torch.load(kept)
    assert in_parts["settings"] == at_once["settings"]
    for name in ("step", "parts", "losses", "curve", "best", "random"):
        torch.testing.assert_close(in_parts[name], at_once[name], rtol=0, atol=0)
    torch.testing.assert_close(torch.load(weights)["model"], weights_at_once, rtol=0, atol=0)


def test_two_runs_at_once_keep_apart(tiny, tmp_path):
    runs = []
    for seed in (1, 2):
        cells = tmp_path / f"cells-{seed}.py"
        cells.write_text("\n".join(code_of(tiny(seed=seed))))
        runs.append(subprocess.Popen([sys.executable, cells], env=QUIET, stdout=subprocess.DEVNULL))
    assert [run.wait(100) for run in runs] == [0, 0]
    kept = [torch.load(tmp_path / f"kept/ours-{seed}.pt") for seed in (1, 2)]
    assert [(run["step"], run["settings"]["seed"]) for run in kept] == [(30, 1), (30, 2)]
    assert torch.load(tmp_path / "weights.pt")["training"]["seed"] in (1, 2)
    assert not list(tmp_path.rglob("*.new"))


@pytest.mark.long
def test_fifty_kills_at_random_moments_change_nothing(train, tmp_path):
    """Among them saves: there is one every five of 2,000 iterations."""
    kept, often = tmp_path / "kept/ours-1.pt", dict(iterations=2000, eval_interval=5)
    assert train(**often).returncode == 0
    at_once = torch.load(kept)
    kept.unlink()
    rng, kills = random.Random(0), 0
    while kills < 50:
        # The process kills itself: it alone knows when its training has begun.
        patch = f"""
import signal, threading
kill = threading.Timer({rng.uniform(0.001, 0.5)}, os.kill, (os.getpid(), signal.SIGKILL))
kill.start()
"""
        done = train(patch, **often)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        kills += done.returncode != 0
        for path in tmp_path.rglob("*.pt"):
            torch.load(path)
        if kept.exists() and torch.load(kept)["step"] == 2000:
            break
    assert kills == 50
    assert train(**often).returncode == 0
    for name in ("step", "parts", "losses", "curve", "best", "random"):
        torch.testing.assert_close(torch.load(kept)[name], at_once[name], rtol=0, atol=0)


@pytest.mark.parametrize("recipe, precision", [("plain", "float32"), ("ours", "float16")])
def test_every_recipe_and_precision_learns_and_goes_on(train, tmp_path, recipe, precision):
    choice = dict(recipe=recipe, precision=precision, attention_dropout=0.1)
    done = train(**choice)
    assert done.returncode == 0, done.stderr
    assert f"; {precision}; torch" in done.stdout
    assert re.search(r"the rest takes about 0\.\d\d hours", done.stdout)
    kept = tmp_path / f"kept/{recipe}-1.pt"
    at_once = torch.load(kept)
    losses = [loss for _, loss in at_once["curve"]]
    assert len(losses) == 3 and losses[-1] < losses[0]

    kept.unlink()
    assert train(KILLED_AT_STEP.format(25), **choice).returncode == -signal.SIGKILL
    assert train(**choice).returncode == 0
    for name in ("parts", "losses", "curve"):
        torch.testing.assert_close(torch.load(kept)[name], at_once[name], rtol=0, atol=0)


def test_the_stop_button_and_the_same_cell_again(train):
    stop = """
advance_on, batches = advance, iter(range(100))
def advance(run):
    if next(batches) == 15:
        raise KeyboardInterrupt
    advance_on(run)
"""
    done = train(stop, again=True)
    assert done.returncode == 0, done.stderr
    assert "stopped: run this cell again" in done.stdout
    assert "stands at step 10: going on" in done.stdout


def test_a_finished_run_and_one_of_other_settings_are_told_apart(train, tmp_path):
    assert train().returncode == 0
    kept = tmp_path / "kept/ours-1.pt"
    content, weights = kept.read_bytes(), (tmp_path / "weights.pt").read_bytes()
    again = train()
    assert again.returncode == 0 and "stands at step 30: a finished run" in again.stdout
    other = train(dropout=0.3)
    assert other.returncode == 1
    line = other.stderr.splitlines()[-1]
    assert "started with other settings (dropout was 0.1, is 0.3): move it away" in line
    assert train(seed=2).returncode == 0  # a run of its own
    assert kept.read_bytes() == content
    assert (tmp_path / "weights.pt").read_bytes() != weights
    kept.write_bytes(content[:1000])
    damaged = train()
    assert damaged.returncode == 1
    assert "ours-1.pt is not a checkpoint of this notebook" in damaged.stderr.splitlines()[-1]


def test_without_network_and_text_the_notebook_says_what_is_missing(train, tmp_path):
    done = train(text_path=str(tmp_path / "input.txt"))
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("RuntimeError: cannot fetch https://raw") and "save it as" in line
    assert not list(tmp_path.glob("input*"))


def test_a_server_that_misbehaves_leaves_nothing(definitions, server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cell = next(source for source in code_of(read_notebook()) if "def fetch" in source)
    cell = cell.replace("timeout=120", "timeout=1")
    cell = re.sub("SHA256 = .*", f'SHA256 = "{hashlib.sha256(b"the text").hexdigest()}"', cell)
    for page in ("/cut", "/none", "/loop", "/stalled", "/drip", "/text"):
        names = definitions | {"text_path": "input.txt"}
        source = re.sub("URL = .*", f'URL = "{server}{page}"', cell)
        if page == "/text":
            exec(source, names)
            assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"the text"]
        else:
            with pytest.raises(RuntimeError, match="input.txt"):
                exec(source, names)
            assert not list(tmp_path.iterdir())


FULL_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
"""


def test_a_full_disk_and_a_foreign_file_lose_nothing(train, tmp_path, monkeypatch):
    assert train(KILLED_AT_STEP.format(15)).returncode == -signal.SIGKILL
    kept = tmp_path / "kept/ours-1.pt"
    earlier = kept.read_bytes()
    done = train(FULL_DISK)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert "ours-1.pt (File too large): what was there before is intact" in line
    assert [path.name for path in kept.parent.iterdir()] == ["ours-1.pt"]
    assert kept.read_bytes() == earlier
    kept.with_name("plain-1.pt").write_bytes(b"damaged")
    kept.unlink()  # a checkpoint that vanished: from the start
    done = train()
    assert done.returncode == 0, done.stderr
    assert "left out of the picture" in done.stdout and "stands at" not in done.stdout
    assert train(n_head=3).stderr.splitlines()[-1].endswith("(32) must be a multiple of n_head (3)")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "kept is read-only: name another folder" in train().stderr


def test_a_loss_that_is_not_finite_stops_the_run(train, tmp_path):
    done = train("pace = lambda step: 1.0 if step < 15 else 1e30")
    assert done.returncode == 1
    assert re.search("the loss is (nan|inf) at step 1[67]: the last good checkpoint", done.stderr)
    kept = torch.load(tmp_path / "kept/ours-1.pt")
    assert kept["step"] == 10
    assert all(tensor.isfinite().all() for tensor in kept["best"].values())


# ------------------------------------------------------------------------ what the repository holds


@pytest.fixture(scope="module")
def committed():
    """The notebook as it was last run, and all that its cells printed."""
    notebook = read_notebook()
    return notebook, *outputs_of(notebook)


def test_the_committed_notebook_is_one_complete_run(committed):
    notebook, outputs, printed = committed
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert {output.output_type for output in outputs} == {
        "stream",
        "display_data",
        "execute_result",
    }
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "10,788,929 parameters" in printed
    assert not re.search(r"/(home|root|tmp|work|mnt|usr|opt|Users)/", nbformat.writes(notebook))


def test_the_shipped_weights_are_those_of_the_committed_notebook(gpt, committed):
    _, outputs, printed = committed
    model, _, training = gpt.load(gpt.WEIGHTS)
    assert sum(parameter.numel() for parameter in model.parameters()) == 10_788_929
    shown = [
        output.data["text/plain"] for output in outputs if output.output_type == "execute_result"
    ]
    assert [ast.literal_eval(text) for text in shown] == [training]
    losses = f"{training['train_loss']:.4f} +{training['val_loss']:.4f}"
    assert re.search(f"best, stored +{training['step']} +{losses}", printed)
    assert training["hardware"] in printed


def test_the_shipped_weights_have_the_same_logits_in_the_notebook(gpt, definitions):
    ours = gpt.load(gpt.WEIGHTS)[0]
    theirs = definitions["GPT"](definitions["Config"](**vars(ours.config))).eval()
    theirs.load_state_dict(ours.state_dict())
    idx = torch.randint(65, (2, 256))
    with torch.inference_mode():
        torch.testing.assert_close(theirs(idx), ours(idx), atol=1e-4, rtol=0)


@pytest.mark.skipif(not SCRIPT.with_name("input.txt").exists(), reason="needs Tiny Shakespeare")
def test_the_shipped_weights_have_the_loss_that_they_claim(gpt, all_cores):
    model, vocab, training = gpt.load(gpt.WEIGHTS)
    _, val_text = gpt.split(gpt.read_text(gpt.TEXT), model.config.block_size)
    loss = gpt.exact_loss(model, gpt.encode(val_text, vocab), model.config.block_size)
    assert loss == pytest.approx(training["val_loss"], abs=1e-4)
