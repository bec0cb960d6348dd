import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "bigram-to-gpt.py"
torch.set_num_threads(1)  # the models are too small for more


def module_of(path):
    """A file as a module; importing it runs nothing."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def gpt():
    """The script as a module."""
    return module_of(SCRIPT)


@pytest.fixture
def all_cores():
    """As many threads as torch would take, for the large model."""
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(1)
