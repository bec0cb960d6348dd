"""Grow a bigram table into a GPT on the CPU, one idea at a time.

    python bigram-to-gpt.py [grow]      train the five models: table, picture, one-block.pt, sample
    python bigram-to-gpt.py sample      stream text from a checkpoint
    python bigram-to-gpt.py evaluate    print a checkpoint's exact losses on a text

After Andrej Karpathy's lecture "Let's build GPT: from scratch, in code, spelled out". The text is
Tiny Shakespeare. The last model, a decoder-only transformer of one block and 60,515 parameters,
ends at a validation loss of 1.990 (mean of seeds 1, 2, 3); counting bigrams gives 2.482. All five
take 22 seconds on two cores of an AMD EPYC of the Zen 4 generation, imports and picture included.

Losses are in nats per character. Shapes stand at the ends of lines: B sequences of T characters, C
channels (n_embd) for each, V characters in the vocabulary, S positions that attention can look at,
P parameters, N of anything.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the libraries load; then see main()

import argparse
import copy
import hashlib
import io
import math
import os
import pickletools
import re
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

# ---------------------------------------------------------------------------------- configuration

HERE = Path(__file__).resolve().parent
WEIGHTS, TEXT = HERE / "gpt_shakespeare.pt", HERE / "input.txt"
MORE = HERE / "assets" / "more.txt"  # text that the model of WEIGHTS wrote
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class UserError(Exception):
    """An error that the user can mend: main() prints it as one line and returns status 2."""


class NotFetched(UserError):
    """Tiny Shakespeare is missing, and could not be downloaded."""


def require(condition, message):
    if not condition:
        raise UserError(message)


def notice(text):
    """Tell it on stderr; that nobody can read it there is no reason to stop."""
    with suppress(OSError):
        print(text, file=sys.stderr)


@dataclass(frozen=True)
class Config:
    """The sizes that fix a model's shapes, by default the last rung's; UserError if absurd."""

    vocab_size: int
    block_size: int = 8  # the context window, in characters
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 65
    dropout: float = 0.0

    def __post_init__(self):
        sizes = self.vocab_size, self.block_size, self.n_layer, self.n_head, self.n_embd
        numbers = all(type(size) is int for size in sizes) and type(self.dropout) in (int, float)
        require(numbers, "sizes that are not numbers")
        sane = all(1 <= size <= 1 << 16 for size in sizes) and 0 <= self.dropout < 1
        scores = self.n_head * self.block_size * max(self.block_size, 2048)  # the most held at once
        sane = sane and self.n_layer <= 1000 and scores <= 1 << 27
        require(sane and self.n_embd % self.n_head == 0, f"sizes that make no sense: {self}")


# ---------------------------------------------------------------------------- text and vocabulary


def write(path, content):
    """Put bytes in the place of a file, all of them or none."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            beside.unlink()


def fetch_text(path, url=URL, sha256=SHA256, patience=120):
    """Download Tiny Shakespeare to `path`, whole and with the right digest, or raise UserError.

    It is a NotFetched if no reply came within `patience` seconds, not if a reply was cut off or is
    another text. More than 4 MiB, well above its size, are never read.
    """
    download = ThreadPoolExecutor().submit(lambda: urlopen(url, timeout=30).read(1 << 22))
    remedy = f"try again, or save it yourself as {path}; its SHA-256 is {sha256}"
    try:
        content = download.result(patience)
    except (OSError, HTTPException) as error:
        reason = str(getattr(error, "reason", error)) or f"not here after {patience} seconds"
        raise NotFetched(f"cannot fetch {url} ({reason}): {remedy}") from None
    right = hashlib.sha256(content).hexdigest() == sha256
    require(right, f"{url} sent {len(content):,} bytes of another digest: {remedy}")
    write(path, content)
    notice(f"fetched {url} to {path}")


def read_text(path):
    """The UTF-8 text in a file; if that is the default one and missing, it is fetched first."""
    if path == TEXT and not path.exists():
        fetch_text(path)
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")
    if path == TEXT and hashlib.sha256(content).hexdigest() != SHA256:
        notice(f"{path} is not Tiny Shakespeare, but used as it is; to fetch that, delete this")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (near byte {error.start}): convert it") from None


def encode(text, vocab):
    """The ids of N characters, (N,): their places in `vocab`; UserError if one has none."""
    unknown = "".join(sorted(set(text) - set(vocab)))
    require(not unknown, f"the model never saw {unknown[:99]!r}: it knows only {vocab[:999]!r}")
    id_of = {character: i for i, character in enumerate(vocab)}
    return torch.from_numpy(np.fromiter(map(id_of.get, text), np.int64, len(text)))


def decode(ids, vocab):
    """The text that N ids stand for, (N,)."""
    return "".join(vocab[i] for i in ids)


def split(text, block_size, name="the text"):
    """The first 90 % of a text to train on, the rest to validate on; a window must fit in each."""
    least = 10 * block_size + 1
    size = f"{name} has {len(text):,} characters, too few"
    require(len(text) >= least, f"{size}: give it {least:,} or more")
    boundary = len(text) * 9 // 10
    return text[:boundary], text[boundary:]


def counted_bigram(train_data, val_data, vocab_size):
    """Both losses, in nats, of a bigram without training: pairs in the train ids, each plus 1."""
    pairs = np.ones((vocab_size, vocab_size))  # (V, V)
    np.add.at(pairs, (train_data[:-1].numpy(), train_data[1:].numpy()), 1)
    surprise = np.log(pairs.sum(axis=1, keepdims=True) / pairs)  # (V, V)
    return [surprise[ids[:-1], ids[1:]].mean() for ids in (train_data, val_data)]


# ------------------------------------------------------------------------------ parts of the model


class Linear(nn.Linear):
    """A linear layer whose weights may be stored in float16 while all around it is float32.

    A single row waits for the weights to come from memory: in float16 they come in half the time.
    Many rows wait for the arithmetic, which CPUs do faster, and more exactly, in float32.
    """

    def forward(self, x):  # (..., in_features)
        if self.weight.dtype == x.dtype or x.numel() == self.in_features:
            return super().forward(x.to(self.weight.dtype)).to(x.dtype)  # (..., out_features)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class KVCache:
    """The keys and values of one attention layer for the characters so far, at most block_size."""

    def __init__(self, batch_size, config):
        shape = batch_size, config.n_head, config.block_size, config.n_embd // config.n_head
        self.keys, self.values = torch.empty(shape), torch.empty(shape)
        self.length = 0

    def extend(self, keys, values):
        """Append T keys and values, (B, n_head, T, head_size), and return all S."""
        new = slice(self.length, self.length + keys.shape[2])
        self.keys[:, :, new], self.values[:, :, new], self.length = keys, values, new.stop
        return self.keys[:, :, : new.stop], self.values[:, :, : new.stop]


class CausalSelfAttention(nn.Module):
    """Each position gathers from itself and those before it (Vaswani et al., 2017)."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):  # (B, T, C)
        B, T, C = x.shape
        heads = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, n_head, T, head_size) each
        if cache is not None:
            k, v = cache.extend(k, v)  # (B, n_head, S, head_size) each
        S = k.shape[2]
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, n_head, T, S)
        if T > 1:  # a position by itself, the newest, has none after it
            later = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)  # (T, S)
            scores = scores.masked_fill(later, -math.inf)
        weights = scores.softmax(dim=-1)  # (B, n_head, T, S)
        out = self.dropout(weights) @ v  # (B, n_head, T, head_size)
        return self.dropout(self.proj(out.transpose(1, 2).reshape(B, T, C)))  # (B, T, C)


class FeedForward(nn.Module):
    """Each position thinks about what it gathered: two layers, 4 times as wide between, ReLU."""

    def __init__(self, config):
        super().__init__()
        self.up = Linear(config.n_embd, 4 * config.n_embd)
        self.down = Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):  # (B, T, C)
        return self.dropout(self.down(F.relu(self.up(x), inplace=True)))


class Block(nn.Module):
    """Attention and feed-forward, each adding to x what it makes of a normalised x."""

    def __init__(self, config):
        super().__init__()
        self.ln1, self.attention = nn.LayerNorm(config.n_embd), CausalSelfAttention(config)
        self.ln2, self.feed_forward = nn.LayerNorm(config.n_embd), FeedForward(config)

    def forward(self, x, cache=None):  # (B, T, C)
        x = x + self.attention(self.ln1(x), cache)
        return x + self.feed_forward(self.ln2(x))


class Model(nn.Module):
    """Token and position embeddings, parts that build on them in turn, a linear head to logits."""

    def __init__(self, config, parts=(), final_norm=nn.Identity):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(part(config) for part in parts)
        self.ln_f = final_norm(config.n_embd)
        self.lm_head = Linear(config.n_embd, config.vocab_size)

    def forward(self, idx, caches=None):  # (B, T)
        start = caches[0].length if caches else 0
        positions = self.position_embedding.weight[start : start + idx.shape[1]]  # (T, C)
        x = self.token_embedding(idx) + positions  # (B, T, C)
        for i, block in enumerate(self.blocks):
            x = block(x, caches[i]) if caches else block(x)  # (B, T, C)
        return self.lm_head(self.ln_f(x))  # (B, T, V)


# --------------------------------------------------------------------------------- the five models


def gpt(config):
    """The whole of it: n_layer blocks, and a LayerNorm before the head."""
    return Model(config, [Block] * config.n_layer, nn.LayerNorm)


RUNGS = (  # name, the idea that it adds, its model
    ("bigram", "a table of logits", lambda c: nn.Embedding(c.vocab_size, c.vocab_size)),
    ("position", "token and position embedded", Model),
    ("attention", "positions talk", lambda c: Model(c, [CausalSelfAttention])),
    ("feed-forward", "positions think", lambda c: Model(c, [CausalSelfAttention, FeedForward])),
    ("block", "residuals and LayerNorm", gpt),
)


def initialize(model, seed):
    """Start from orthogonal matrices (Saxe et al., 2014), large embeddings and a small head."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            gain = 2.0 if "embedding" in name else 0.3 if "lm_head" in name else 1.0
            nn.init.orthogonal_(parameter, gain)
    return model


# ------------------------------------------------------------------------------- loss and training


@contextmanager
def evaluating(model):
    """Dropout is off inside; afterwards the model is in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.inference_mode()
def exact_loss(model, data, block_size, track=iter):
    """The mean loss, in nats, over every character of `data`, (N,), that has one before it."""
    size = len(data) - 1
    padding = -size % block_size
    x = F.pad(data[:-1], (0, padding)).view(-1, block_size)  # (N, T)
    y = F.pad(data[1:], (0, padding), value=-100).view(-1, block_size)  # cross_entropy skips -100
    rows, total = max(1, 2048 // block_size), 0.0  # more would not fit in a core's cache
    with evaluating(model):
        for inputs, targets in track([*zip(x.split(rows), y.split(rows))]):  # (B, T) each
            logits = model(inputs).flatten(0, 1)  # (B * T, V)
            total += F.cross_entropy(logits, targets.flatten(), reduction="sum").item()
    return total / size


def batches(data, block_size, batch_size, seed):
    """Yield inputs and targets, (B, T) each, for ever: `data` cut into windows, in random order.

    No window comes again before all have come.
    """
    windows = data.unfold(0, block_size + 1, block_size)  # (N, T + 1), overlapping by a character
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < batch_size:
            order = torch.cat((order, torch.randperm(len(windows), generator=generator)))
        rows, order = order[:batch_size], order[batch_size:]  # (B,) and what is left
        batch = windows[rows]  # (B, T + 1)
        yield batch[:, :-1], batch[:, 1:]


def train(model, data, val_data, block_size, steps, seed, track=iter, batch_size=32, max_lr=8e-3):
    """Train `model` on the ids `data` and leave it with its best weights.

    Return the exact losses on `val_data` at five moments, [(step, loss), ...], in nats; the weights
    are those of the lowest. The optimizer is a quasi-hyperbolic Adam (Ma and Yarats, 2018) with
    decoupled weight decay: it goes by a mix of the newest gradient and the mean of the last ones.
    """
    # All P parameters become views into one vector, their gradients into another: an update takes
    # a few operations, not a few for each matrix.
    parameters = list(model.parameters())
    flat = nn.utils.parameters_to_vector(parameters).detach()  # (P,)
    nn.utils.vector_to_parameters(flat, parameters)
    grad = torch.zeros_like(flat)  # (P,)
    for parameter, part in zip(parameters, grad.split([p.numel() for p in parameters])):
        parameter.grad = part.view_as(parameter)
    # The head learns best at three times the rate of the rest.
    paces = (torch.full_like(p, 3 if "head" in name else 1) for name, p in model.named_parameters())
    pace = nn.utils.parameters_to_vector(paces).detach()  # (P,)

    mean, square = torch.zeros_like(flat), torch.zeros_like(flat)  # over the last 100 steps or so
    eval_steps = {math.ceil(steps * part) for part in (1 / 30, 1 / 10, 1 / 3, 2 / 3, 1)}
    curve, best_loss, best = [], math.inf, flat.clone()
    all_batches = batches(data, block_size, batch_size, seed)
    for step, (x, y) in zip(track(range(1, steps + 1)), all_batches):
        logits = model(x)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        grad.zero_()
        loss.backward()
        mean.lerp_(grad, 0.01)
        square.lerp_(grad**2, 0.01)
        direction = grad.lerp(mean, 0.6)  # the newest gradient has a say of 0.4
        size = (square / (1 - 0.99**step)).sqrt() + 1e-8
        lr = max_lr * (1 - (step - 1) / steps)
        flat.mul_(1 - 0.03 * lr).addcdiv_(pace * direction, size, value=-lr)
        if step in eval_steps:
            curve.append((step, exact_loss(model, val_data, block_size)))
            if curve[-1][1] < best_loss:
                best_loss, best = curve[-1][1], flat.clone()
    flat.copy_(best)
    return curve


# -------------------------------------------------------------------------------------- checkpoint


def save(path, model, vocab, training):
    """Write a checkpoint of plain types and tensors, whole or not at all."""
    # After training all parameters lie in one vector: without clone() each would bring all of it.
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parts = {"config": asdict(model.config), "vocab": vocab, "model": weights, "training": training}
    buffer = io.BytesIO()
    torch.save(parts, buffer)
    write(path, buffer.getbuffer())


def check_pickle(pickled):
    """UserError if a pickle is more than the tensors and plain types that a checkpoint needs.

    weights_only keeps code from running. This keeps bytearray(10**12) from being made, and keys
    from being tuples of tuples, whose hashes could take for ever. It follows the unpickler's stack.
    """
    plain = r"collections OrderedDict|torch._utils _rebuild_tensor_v2|torch [A-Z]\w+Storage"
    # A value is the operation that made it, its argument, and the values that it took.
    stack, marks, memo = [], [], {}
    for operation, argument, _ in pickletools.genops(pickled):
        name, before = operation.name, operation.stack_before
        if name.endswith("PUT"):
            memo[argument] = stack[-1]
        start = len(stack) - len(before)
        if name == "MARK":
            marks.append(start)
        elif pickletools.markobject in before:
            start = marks.pop() - before.index(pickletools.markobject)
        taken = [value for value in stack[start:] if value[0] != "MARK"]
        hashed = taken[1::2] if "SETITEM" in name else taken[0][2] if name == "BINPERSID" else []
        fits = name not in ("NEWOBJ", "STACK_GLOBAL") and not any(values for _, _, values in hashed)
        if name == "GLOBAL":
            fits = re.fullmatch(plain, argument)
        elif name == "REDUCE" and "Dict" in taken[0][1]:
            fits = not taken[1][2]  # the dict begins empty
        more = f"it holds more than tensors and plain types ({argument or name})"
        require(fits, f"{more}: save the state_dict alone")
        made = memo[argument] if name.endswith("GET") else (name, argument, taken)
        stack[start:] = [made] * len(operation.stack_after)


def unpickle(content):
    """The dict in the bytes of a file by torch.save, or an exception. No code in it runs."""
    usual = r"[^/]+/(data/\d+|data\.pkl|\.data/[a-z_]+|\.?[a-z_]+)"
    # Lower case only: to torch, DATA.PKL is data.pkl.
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = archive.namelist()
        whole = sum(part.file_size for part in archive.infolist()) <= len(content)
        whole = whole and all(re.fullmatch(usual, name) for name in names)
        whole = whole and archive.testzip() is None
        require(whole, "it is damaged, compressed, or not by torch.save")
        [pickled] = [name for name in names if name.endswith("/data.pkl")]
        check_pickle(archive.read(pickled))
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    require(isinstance(checkpoint, dict), "it is not a dict")
    return checkpoint


def check_tensors(weights, file_size):
    """UserError unless these are tensors of floats that fit in a file of so many bytes."""
    claimed = 0
    for name, tensor in weights.items():
        floats = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
        require(floats, f"{name} is not a tensor of floats")
        claimed += math.prod(tensor.shape) * tensor.itemsize
    # Twice, since two names may share a tensor.
    require(claimed <= 2 * file_size, "its tensors claim to be larger than the file")


def build(config, weights):
    """The GPT of these sizes and weights, in float32 and eval mode, if they fit and are sane."""
    V, T, L, C = config.vocab_size, config.block_size, config.n_layer, config.n_embd
    wanted, found = (2 * V + T + 12 * L * C) * C, sum(tensor.numel() for tensor in weights.values())
    require(wanted <= 2 * found, "its config asks for many more weights than it has")
    model = gpt(config)  # not on the meta device, which takes a second of imports
    model.load_state_dict(weights, assign=True)  # a RuntimeError names what does not fit
    model.float()
    sane = all((parameter.abs() < 1e4).all() for parameter in model.parameters())  # false for NaN
    require(sane, "some of its numbers are enormous, or none at all")
    return model.eval()


LECTURE = {  # what the lecture's GPTLanguageModel calls the parts, and what they are called here
    "_embedding_table.": "_embedding.",
    ".sa.proj.": ".attention.proj.",
    ".ffwd.net.0.": ".feed_forward.up.",
    ".ffwd.net.2.": ".feed_forward.down.",
}


def lecture_part(checkpoint):
    """The state_dict of a GPTLanguageModel that a dict is or holds, without masks and prefixes."""
    table = "token_embedding_table.weight"
    parts = [part for part in (checkpoint, *checkpoint.values()) if isinstance(part, dict)]
    for part in parts:
        for found in map(str, part):
            if found.endswith(table):
                before = found.removesuffix(table)  # "module." of a parallel model, for instance
                return {str(name).removeprefix(before): tensor for name, tensor in part.items()
                        if not str(name).endswith(".tril")}  # fmt: skip
    wanted = "neither ours (config, vocab, model, training) nor the lecture's GPTLanguageModel"
    raise UserError(f"{wanted}: it has {list(max(parts, key=len))[:3]}")


def from_lecture(weights):
    """The config of a GPTLanguageModel, and its weights in our names, heads in one matrix."""
    renamed, nothing = {}, torch.empty(0)
    for name, tensor in weights.items():
        for theirs, ours in LECTURE.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    tables = [renamed.get(f"{kind}_embedding.weight", nothing) for kind in ("token", "position")]
    two = all(table.dim() == 2 for table in tables)
    require(two, "token_embedding_table and position_embedding_table are not two tables")
    (V, C), T = tables[0].shape, len(tables[1])
    n_layer = len({name.split(".")[1] for name in renamed if name.startswith("blocks.")})
    heads = {name.split(".")[4] for name in renamed if name.startswith("blocks.0.sa.heads.")}
    n_head = max(1, len(heads))
    config = Config(V, T, n_layer, n_head, C)
    for n in range(n_layer):
        names = [f"blocks.{n}.sa.heads.{m}.{kind}.weight"
                 for kind in ("query", "key", "value") for m in range(n_head)]  # fmt: skip
        for name in names:
            fits = renamed.get(name, nothing).shape == (C // n_head, C)
            require(fits, f"{name} is missing, or not {C // n_head} x {C}")
        stacked = torch.cat([renamed.pop(name) for name in names])  # (3 C, C)
        renamed[f"blocks.{n}.attention.qkv.weight"] = stacked
    return config, renamed


def with_its_scale(model, data):
    """A model of the lecture with queries as its own code scales them, judged by ids, (N,).

    The first code of the lecture, which many typed, divides scores by the root of n_embd; the later
    one, as ours, by that of head_size. Weights do not tell which, but a text that they know does.
    """
    config, other = model.config, copy.deepcopy(model)
    for block in other.blocks:
        block.attention.qkv.weight.data[: config.n_embd] /= math.sqrt(config.n_head)
    window = min(config.block_size, 256)
    later, first = (exact_loss(either, data, window) for either in (model, other))
    if first > min(later - 0.001, 0.8 * math.log(config.vocab_size)):
        return model
    notice("scores are divided by the root of n_embd, as in the first code of the lecture")
    return other


def load(path, text_path=TEXT):
    """The GPT in a checkpoint, in eval mode, its vocabulary, and how it was trained.

    It is float32, but the linear layers of a file of ours that is all float16 stay so. Weights of
    the lecture's GPTLanguageModel have no vocabulary: theirs is taken from a text. A UserError
    tells that a file is missing, damaged, or at odds with itself.
    """
    made = "`python bigram-to-gpt.py` makes one-block.pt; then say --weights one-block.pt"
    require(path.is_file(), f"there is no file of weights {path}: {made}")
    require(path.stat().st_size <= 1 << 32, f"{path} is too large for a checkpoint: {made}")
    content = path.read_bytes()
    try:
        checkpoint = unpickle(content)
        ours = {"config", "vocab", "model", "training"} <= checkpoint.keys()
        weights = checkpoint["model"] if ours else lecture_part(checkpoint)
        check_tensors(weights, len(content))
        if ours:
            config, vocab = Config(**checkpoint["config"]), checkpoint["vocab"]
            training = checkpoint["training"]
            in_order = vocab == "".join(sorted(set(vocab))) and len(vocab) == config.vocab_size
            require(in_order, "its vocabulary is not vocab_size characters in order")
            require(isinstance(training, dict), "its training is not a dict")
        else:
            config, weights = from_lecture(weights)
        model = build(config, weights)
    except Exception as error:  # a damaged file makes torch.load raise almost anything
        reason = "it is damaged, or not as torch.save writes it"
        if isinstance(error, UserError) or re.search("state_dict|Config", str(error)):
            reason = str(error)[:300]
        raise UserError(f"{path} is no checkpoint: {reason}; name another") from None
    if ours:
        if all(tensor.dtype == torch.float16 for tensor in weights.values()):
            model.apply(lambda module: module.half() if isinstance(module, Linear) else module)
        return model, vocab, training
    read_text(text_path)  # which may have to be fetched first
    text = text_path.read_text(encoding="utf-8")  # as in the lecture: a byte-order mark stays
    vocab = "".join(sorted(set(text)))
    differ = f"{path} knows {config.vocab_size} characters, {text_path} has {len(vocab)}"
    require(len(vocab) == config.vocab_size, f"{differ}: give it its text as --input")
    if len(text) > 1:
        model = with_its_scale(model, encode(text[:5000], vocab))
    return model, vocab, {}


# -------------------------------------------------------------------------------------- generation


@torch.inference_mode()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
    """Continue `idx`, (B, T): yield the next ids, (B,), `max_new_tokens` times.

    Each layer caches its keys and values, so that a step computes the newest position alone.
    Learned positions hold them in their places; hence, when the window is full, its last half is
    fed in again from position 0 on. Until then the result is that of recomputing the whole prefix.
    """
    block_size = model.config.block_size
    unread = window = idx[:, -block_size:]  # (B, T)
    caches = [KVCache(len(idx), model.config) for _ in model.blocks]
    with evaluating(model):
        for _ in range(max_new_tokens):
            if caches[0].length == block_size:
                unread = window[:, -max(1, block_size // 2) :]  # (B, T)
                for cache in caches:
                    cache.length = 0
            logits = model(unread, caches)[:, -1]  # (B, V)
            require(logits.isfinite().all(), "its numbers overflow: try --precision float32")
            drawn = choose(logits, temperature, top_k, generator)  # (B, 1)
            yield drawn[:, 0]
            window = torch.cat((window, drawn), dim=1)[:, -block_size:]  # (B, T)
            unread = drawn


def choose(logits, temperature, top_k, generator):
    """Draw one id for each row of logits, (B, V) to (B, 1); at temperature 0 take the likeliest."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    top = logits.topk(min(top_k or 1, logits.shape[-1])).values  # (B, k), in descending order
    scaled = (logits - top[:, :1]).double() / temperature  # at most zero, so that nothing overflows
    if top_k:
        scaled = scaled.masked_fill(logits < top[:, -1:], -math.inf)
    return torch.multinomial(scaled.softmax(dim=-1), 1, generator=generator)


# ------------------------------------------------------------------------------------ command line


def grow(args):
    """Train the five models: print a table, save a picture and the last model, sample it."""
    from tqdm import tqdm  # with disable=None it draws bars in terminals only

    try:
        text = read_text(args.input)
    except NotFetched as error:
        if not MORE.exists():
            raise
        notice(f"WARNING: {error}")
        notice(f"WARNING: growing on {MORE} instead, which our large model wrote: other losses;")
        notice(f"WARNING: to evaluate this model later, say --input {MORE}")
        args.input, text = MORE, read_text(MORE)
    vocab, block_size, name = "".join(sorted(set(text))), Config.block_size, args.input.name
    many = f"{args.input} has {len(vocab):,} distinct characters"
    require(len(vocab) <= 10_000, f"{many}: give a text of 10,000 at most")
    data, val_data = (encode(part, vocab) for part in split(text, block_size, args.input))
    # What would keep us from saving had better be found out now than after training.
    args.out.mkdir(parents=True, exist_ok=True)
    require(os.access(args.out, os.W_OK), f"{args.out} is read-only: name another --out")
    weights_path, picture_path = args.out / "one-block.pt", args.out / "growth.png"
    for path in (weights_path, picture_path):
        taken = path.is_dir() or (path.exists() and path.samefile(args.input))
        require(not taken, f"{path} is a directory or the text itself: name another --out")

    print(f"{name}: {len(text):,} characters, {len(vocab)} of them distinct;")
    print(f"{len(data):,} to train on, {len(val_data):,} to validate on\n")
    row = "{:14} {:27} {:>6} {:>6} {:>6} {:>9} {:>4}".format
    print(row("rung", "adds", "params", "train", "val", "bits/char", "secs"))
    counted = counted_bigram(data, val_data, len(vocab))
    losses = map("{:.4f}".format, counted)
    print(row("0 counting", "pairs counted, not trained", "", *losses, "", ""))

    config, seed = Config(len(vocab)), args.seed
    titles = [f"{i} {rung}" for i, (rung, _, _) in enumerate(RUNGS, start=1)]
    models = [initialize(make(config), seed) for _, _, make in RUNGS]

    def grow_rung(title, model):
        start, bar = time.perf_counter(), partial(tqdm, desc=title, leave=False, disable=None)
        curve = train(model, data, val_data, block_size, args.steps, seed, bar)
        return curve, exact_loss(model, data, block_size), time.perf_counter() - start

    # Models side by side, a core each, are done sooner than one after the other on all cores.
    torch.set_num_threads(1)
    # Ctrl-C ends them at once. A KeyboardInterrupt inside tqdm could leave its lock taken for ever.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    results = ThreadPoolExecutor(os.cpu_count()).map(grow_rung, titles, models)
    grown = []
    for title, (_, adds, _), model, result in zip(titles, RUNGS, models, results):
        curve, train_loss, seconds = result
        step, val_loss = min(curve, key=lambda point: point[1])
        parameters = f"{sum(parameter.numel() for parameter in model.parameters()):,}"
        losses = map("{:.4f}".format, (train_loss, val_loss, val_loss / math.log(2)))
        tqdm.write(row(title, adds, parameters, *losses, f"{seconds:.1f}"))
        grown.append((title, curve, train_loss, val_loss))
    from matplotlib.figure import Figure  # while Ctrl-C still ends us, not some import halfway

    signal.signal(signal.SIGINT, signal.default_int_handler)

    training = {"step": step, "train_loss": train_loss, "val_loss": val_loss, "seed": seed}
    training |= {"device": "cpu", "torch": str(torch.__version__), "text": name}
    save(weights_path, model, vocab, training)
    draw(Figure(figsize=(10, 5), layout="constrained"), picture_path, grown, counted[1], name)
    notice(f"wrote {weights_path} and {picture_path}")
    generator = torch.Generator().manual_seed(seed)
    ids = generate(model, torch.zeros(1, 1, dtype=torch.long), 500, generator=generator)
    print("\n500 characters from the last model:\n\n" + decode(ids, vocab))


def draw(figure, path, grown, counted, name):
    """Save the picture: validation losses during training, in the legend those of what is kept."""
    from matplotlib import colormaps

    axes = figure.subplots()
    label = f"{counted:.3f}  bigrams counted"
    axes.axhline(counted, linestyle="--", color="grey", linewidth=1, label=label)
    colours = colormaps["viridis"](np.linspace(0.8, 0.0, len(grown)))
    for (title, curve, train_loss, val_loss), colour in zip(grown, colours):
        label = f"{val_loss:.3f}  {title} (train {train_loss:.3f})"
        axes.plot(*zip(*curve), "o-", color=colour, label=label)
    axes.legend(title="loss of the weights kept")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set(xlabel="iteration", ylabel="validation loss (nats per character)")
    axes.set_title(f"Growing on {name.encode(errors='replace').decode()}", parse_math=False)
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # a name may have characters that no font has
        figure.savefig(buffer, format="png", dpi=150)
    write(path, buffer.getbuffer())


def settle_threads(model):
    """One thread for a small model: its work is sooner done than divided among busy cores."""
    if sum(parameter.numel() for parameter in model.parameters()) < 1_000_000:
        torch.set_num_threads(1)


def sample(args):
    """Continue the prompt on stdout: one text as it is drawn, or several, drawn as one batch."""
    model, vocab, _ = load(args.weights, args.input)
    settle_threads(model)
    if args.precision == "float32" or args.samples > 1:
        model.float()  # several texts would gain nothing from float16
    prompt = args.prompt
    if prompt == "-":
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="replace", newline=None)
        prompt = sys.stdin.read()
    idx = encode(prompt or vocab[0], vocab).repeat(args.samples, 1)  # (B, T)
    seed = torch.seed() % 2**32 if args.seed is None else args.seed
    generator = torch.Generator().manual_seed(seed)
    columns = generate(model, idx, args.tokens, args.temperature, args.top_k, generator)
    drawn, alone, start = [], args.samples == 1, time.perf_counter()
    try:
        if alone:
            print(prompt, end="", flush=True)
        for ids in columns:  # (B,)
            drawn.append(ids.tolist())
            if alone:
                print(vocab[ids[0]], end="", flush=True)
    finally:  # after Ctrl-C as well
        speed = len(drawn) * args.samples / (time.perf_counter() - start)
        if not alone:
            texts = (prompt + decode(ids, vocab) for ids in zip(*drawn))
            print(f"\n{'-' * 40}\n".join(texts), end="", flush=True)
    if sys.stdout.isatty():
        print()
    elif sys.stderr.isatty():
        notice("")
    precision = str(model.lm_head.weight.dtype).removeprefix("torch.")
    notice(f"{speed:,.0f} characters per second in {precision}, seed {seed}")


def evaluate(args):
    """Print a checkpoint's exact losses on both splits of a text, beside those that it claims."""
    from tqdm import tqdm

    model, vocab, training = load(args.weights, args.input)
    settle_threads(model)
    model, block_size = model.float(), model.config.block_size
    parts = split(read_text(args.input), block_size, args.input)
    splits = [encode(part, vocab) for part in parts]
    print(f"{'loss on ' + args.input.name:24} {'measured':>10} {'in the file':>12}")
    for title, key, data in zip(("train", "validation"), ("train_loss", "val_loss"), splits):
        bar = partial(tqdm, desc=title, leave=False, disable=None)
        loss, claim = exact_loss(model, data, block_size, bar), training.get(key)
        claim = f"{claim:.4f}" if isinstance(claim, float) else "nothing"
        print(f"{title:24} {loss:10.4f} {claim:>12}")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        hint = "; before a dash, put =" if "expected one argument" in message else ""
        raise UserError(f"{message}{hint} (see {self.prog} --help)")


def number(kind, low, high=2**63 - 1):
    """An argparse type: an int or a float from `low` to `high`."""

    def parse(text):
        with suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        name = {int: "a whole number", float: "a number"}[kind]
        raise argparse.ArgumentTypeError(f"{text!r} is not {name} from {low} to {high:,}")

    return parse


def parse(argv):
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["grow", *argv]
    parser = Parser(
        description="Grow a bigram table into a GPT on the CPU; sample and evaluate checkpoints.",
        epilog="Each action has a --help of its own. Without an action, it is grow.",
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    def action(run, text):
        added = actions.add_parser(run.__name__, help=text, description=text)
        added.set_defaults(run=run)
        return added.add_argument

    natural, seed = number(int, 1), number(int, 0)
    text = {"type": Path, "metavar": "FILE", "default": TEXT}
    weights = text | {"default": WEIGHTS, "help": f"ours, or the lecture's ({WEIGHTS.name})"}

    option = action(grow, "train five models: a table, growth.png, one-block.pt and a sample")
    option("--input", **text, help="your own UTF-8 text (default: Tiny Shakespeare)")
    option("--steps", metavar="N", type=natural, default=3000, help="iterations per model (3000)")
    option("--seed", metavar="N", type=seed, default=1337, help="fixes losses and sample (1337)")
    option("--out", type=Path, metavar="DIR", default=Path(),
           help="where the two files go (current directory)")  # fmt: skip

    option = action(sample, "continue a prompt on stdout")
    option("--weights", **weights)
    option("--input", **text, help="what the lecture's weights were trained on (Tiny Shakespeare)")
    option("--prompt", metavar="TEXT", default="", help="what to continue; - reads it from stdin")
    option("--tokens", metavar="N", type=natural, default=500, help="how many characters (500)")
    option("--temperature", metavar="F", type=number(float, 0, math.inf), default=1.0,
           help="0 takes the likeliest, below 1 is careful, above 1 is wild (1.0)")  # fmt: skip
    option("--top-k", metavar="N", type=natural, help="draw among the N likeliest only")
    option("--seed", metavar="N", type=seed, help="the same seed draws the same text (random)")
    option("--samples", metavar="N", type=number(int, 1, 256), default=1, help="how many (1)")
    option("--precision", choices=("stored", "float32"), default="stored",
           help="of the linear layers: as in the file (stored), or float32")  # fmt: skip

    option = action(evaluate, "print a checkpoint's exact train and validation loss on a text")
    option("--weights", **weights)
    option("--input", **text, help="the UTF-8 text (default: Tiny Shakespeare)")
    return parser.parse_args(argv)


def main(argv):
    """Run one action and return the exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Streams that are closed are None.
    sys.stdin = sys.stdin or open(os.devnull)
    sys.stdout, sys.stderr = (s or open(os.devnull, "w") for s in (sys.stdout, sys.stderr))
    # A terminal that lacks a character shows "?"; whoever reads us gets each line when it is done.
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        args = parse(argv)
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever reads us, such as head, has seen enough
        return 141
    except (UserError, OSError) as error:
        if isinstance(error, OSError):
            file, reason = error.filename or "stdout", error.strerror or error
            error = f"cannot use {file}: {reason}; name another"
        line = " ".join(["error:", *str(error).split()])
        notice("".join(c if c.isprintable() else "?" for c in line))
        return 2
    return 0


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # at once: it waits for no model that is still being trained
