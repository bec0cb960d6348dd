"""The script is killed, or runs twice at once: one-block.pt and growth.png are always whole."""

import io
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import SCRIPT

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL to send")

KILLED_IN_SAVE = """
import os, pathlib, runpy, signal, sys
write_bytes, saves = pathlib.Path.write_bytes, {}
def die_with_half_a_file(path, content):
    global saves
    saves -= 1
    if saves:
        return write_bytes(path, content)
    write_bytes(path, content[:len(content) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
pathlib.Path.write_bytes = die_with_half_a_file
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def options(tmp_path):
    words = random.Random(1).choices(["over", "the", "hills", "and", "far", "away,\n"], k=500)
    (tmp_path / "text.txt").write_text(" ".join(words), encoding="utf-8")
    files = "--input", tmp_path / "text.txt", "--out", tmp_path / "out"
    return [str(option) for option in ("grow", *files, "--steps", 30)]


def whole(folder):
    """The two files, each found to be whole."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}
    assert files.keys() == {"one-block.pt", "growth.png"}
    assert torch.load(io.BytesIO(files["one-block.pt"]), weights_only=True)["vocab"]
    assert files["growth.png"].startswith(b"\x89PNG") and b"IEND" in files["growth.png"][-12:]
    return files


def start(*command):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *command], **pipes)


def test_a_kill_in_a_save_leaves_the_earlier_file(options, tmp_path):
    (tmp_path / "out").mkdir()
    weights, picture = (tmp_path / "out" / name for name in ("one-block.pt", "growth.png"))
    for path in (weights, picture):
        path.write_bytes(b"earlier")
    for save in (1, 2):
        killed = start("-c", KILLED_IN_SAVE.format(save), SCRIPT, *options)
        assert killed.wait(60) == -signal.SIGKILL
        assert picture.read_bytes() == b"earlier"
        if save == 1:
            assert weights.read_bytes() == b"earlier"
    assert torch.load(weights, weights_only=True)["vocab"]


def test_two_runs_at_once_leave_whole_files(options, tmp_path):
    runs = [start(SCRIPT, *options, "--seed", seed) for seed in "12"]
    assert [run.wait(100) for run in runs] == [0, 0]
    seed = torch.load(tmp_path / "out/one-block.pt", weights_only=True)["training"]["seed"]
    assert whole(tmp_path / "out") and seed in (1, 2)
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.long
def test_kills_at_random_moments_leave_whole_files(options, tmp_path):
    assert start(SCRIPT, *options).wait(60) == 0
    rng, kills = random.Random(0), 0
    while kills < 50:
        process = start(SCRIPT, *options, "--seed", str(kills))
        process.stdout.readline()  # it is about to train
        time.sleep(rng.uniform(0, 1))
        process.kill()
        kills += process.wait(10) == -signal.SIGKILL
        whole(tmp_path / "out")
