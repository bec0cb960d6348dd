import importlib.util
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's threads share busy cores better

import pytest
import torch
from hypothesis import settings

SCRIPT = Path(__file__).resolve().parent.parent / "bigram-to-gpt.py"
torch.set_num_threads(1)  # the models are too small for more
settings.register_profile("the same each time", derandomize=True, database=None, deadline=None)
settings.load_profile("the same each time")


def module_of(path):
    """A file as a module; importing it runs nothing."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def named_as_in_the_lecture(textbook):
    """The weights of the benchmark's textbook model. Only the feed-forward layers are renamed."""
    weights = textbook.state_dict()
    return {name.replace(".ffwd.", ".ffwd.net."): weights[name] for name in weights}


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


@pytest.fixture
def server():
    """A server on this machine that gives b"the text" at /moved, and misbehaves at other pages."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/bad":
                return self.wfile.write(b"this is no HTTP\n")
            moved = {"/moved": "/text", "/loop": "/loop"}.get(self.path)
            self.send_response(302 if moved else 404 if self.path == "/none" else 200)
            if moved:
                self.send_header("Location", moved)
            content = {"/text": b"the text", "/cut": b"the", "/other": b"no text!"}
            self.send_header("Content-Length", "8" if self.path in content else "0")
            self.end_headers()
            self.wfile.write(content.get(self.path, b""))

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
