import importlib.util
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "bigram-to-gpt.py"
torch.set_num_threads(1)  # the models are too small for more


@pytest.fixture(scope="session")
def gpt():
    """The script as a module; importing it runs nothing."""
    spec = importlib.util.spec_from_file_location("bigram_to_gpt", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
