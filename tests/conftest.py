"""What several files of tests need."""

import importlib.util
import os
import random
import sys
from pathlib import Path

import pytest
from hypothesis import settings

SCRIPT = Path(__file__).resolve().parent.parent / "bigram-to-gpt.py"
settings.register_profile("the same each time", derandomize=True, database=None, deadline=None)
settings.load_profile("the same each time")


def module_of(path):
    """A file as a module; importing it runs nothing."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpt = module_of(SCRIPT)
torch = gpt.torch  # the script says how threads wait before it imports torch
torch.set_num_threads(1)  # most models here are too small for more
benchmark = module_of(SCRIPT.with_name("benchmark.py"))
needs_text = pytest.mark.skipif(not gpt.TEXT.exists(), reason="needs Tiny Shakespeare")


def some_text(words):
    """A text of our own, the same each time, in which much can be predicted."""
    kinds = ["I went", "to", "the", "gym", "today", "and", "far", "away,\n", "Zoë paid 5 € 😀"]
    return " ".join(random.Random(1).choices(kinds, k=words))


@pytest.fixture
def all_cores():
    """As many threads as torch would take, for the large model."""
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(1)
