"""What several test files need."""

import os
import random
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["MPLBACKEND"] = "Agg"  # no test waits until somebody closes a window
SCRIPT = Path(__file__).resolve().parent.parent / "bigram-to-gpt.py"
gpt = import_module(SCRIPT.stem)  # importing it runs nothing
torch = gpt.torch  # the script sets GOMP_SPINCOUNT before it imports torch
cores = torch.get_num_threads()
torch.set_num_threads(1)  # most models here are too small for more
import_module("matplotlib.font_manager")  # the first import may warn that it builds a cache
needs_text = pytest.mark.skipif(not gpt.TEXT.exists(), reason="needs Tiny Shakespeare")
settings.register_profile("the same each time", derandomize=True, database=None, deadline=None)
settings.load_profile("the same each time")


def some_text(count):
    """A text of our own, the same each time, in which much can be predicted."""
    pieces = ["I went", "to", "the", "gym", "today", "and", "far", "away,\n", "Zoë paid 5 € 😀"]
    return " ".join(random.Random(1).choices(pieces, k=count))


def seeded(seed):
    return torch.Generator().manual_seed(seed)
