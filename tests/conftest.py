"""What several test files need: the script as a module, a text, models grown from it.
`grown` has a byte order mark in its text and a pipe that is set to ASCII."""

import os
import random
import subprocess
import sys
from collections import namedtuple
from importlib import import_module
from pathlib import Path

import pytest

os.environ["MPLBACKEND"] = "Agg"  # no test waits until somebody closes a window
SCRIPT = Path(__file__).resolve().parent.parent / "bigram-to-gpt.py"
gpt = import_module(SCRIPT.stem)  # importing it runs nothing
torch = gpt.torch  # the script sets GOMP_SPINCOUNT before it imports torch
cores = torch.get_num_threads()
torch.set_num_threads(1)  # most models here are too small for more
needs_text = pytest.mark.skipif(not gpt.TEXT.exists(), reason="needs Tiny Shakespeare")
Growth = namedtuple("Growth", "folder, out")
GROW = ("--input", "text.txt", "--steps", 40, "--seed", 5)


def some_text(pieces):
    """A text of our own, the same each time, in which much can be predicted."""
    choice = ["I went", "to", "the", "gym", "today", "and", "far", "away,\n", "Zoë paid 5 € 😀"]
    return " ".join(random.Random(1).choices(choice, k=pieces))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def run(*args, script=SCRIPT, **options):
    """The script, or another, in a process of its own: its status and its output, as bytes."""
    command = [sys.executable, script, *map(str, args)]
    return subprocess.run(command, capture_output=True, timeout=99, **options)


@pytest.fixture(scope="session")
def grown(tmp_path_factory):
    """A folder in which the script grew its models from a text of our own; what it printed."""
    folder = tmp_path_factory.mktemp("grown")
    (folder / "text.txt").write_text(some_text(900), encoding="utf-8-sig")
    only_ascii = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = run(*GROW, cwd=folder, env=only_ascii)
    assert result.returncode == 0, result.stderr.decode()
    return Growth(folder, result.stdout.decode())


@pytest.fixture
def call(grown, monkeypatch, capfd):
    """A function that runs a command line there, on one-block.pt: status, stdout, stderr."""
    monkeypatch.chdir(grown.folder)
    monkeypatch.setattr(gpt, "WEIGHTS", grown.folder / "one-block.pt")
    return lambda *args: (gpt.main(list(map(str, args))), *capfd.readouterr())
