"""Grow a bigram table into a GPT, one idea at a time, on a CPU.

    python bigram-to-gpt.py             train five models; save the last one and a plot
    python bigram-to-gpt.py sample      let a trained model write
    python bigram-to-gpt.py evaluate    measure a trained model's loss on a text

For people who have just watched Andrej Karpathy's lecture "Let's build GPT: from scratch, in code,
spelled out". Losses are in nats per character: the mean of -ln(probability that the model gave to
the character that really came). Comments at the ends of lines give shapes:

    B   sequences in a batch                    C   channels of a position (n_embd)
    T   positions in a sequence                 V   characters in the vocabulary
    S   positions that attention can look at    N   any number
"""

import argparse
import copy
import errno
import hashlib
import io
import math
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.request import urlopen

# On Linux, a thread of torch that waits for others keeps its core busy for 300,000 turns of a loop
# before it sleeps. If another program needs this core, too, both can become many times slower.
# 3,000 turns are enough. The setting only works before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

WEIGHTS = Path(__file__).resolve().with_name("gpt_shakespeare.pt")  # trained in model.ipynb
# Text of the large model: sample --tokens 500000 --seed 1 --temperature 1
FALLBACK = WEIGHTS.with_name("assets") / "more.txt"
TEXT = WEIGHTS.with_name("input.txt")  # Tiny Shakespeare, downloaded when it is first needed
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# ------------------------------------------------------------------------------- characters to ids


def vocabulary(text):
    """All distinct characters of a text, sorted. A character's place in this string is its id."""
    return "".join(sorted(set(text)))


def encode(text, vocab, name="the prompt"):
    """The ids of N characters, (N,). UserError if the vocabulary lacks one of them."""
    unknown = "".join(sorted(set(text) - set(vocab)))
    if unknown:
        raise UserError(f"{name} has {unknown[:99]!r}, but the model knows only {vocab[:999]!r}")
    id_of = {character: i for i, character in enumerate(vocab)}
    return torch.from_numpy(np.fromiter(map(id_of.get, text), np.int64, len(text)))


def decode(ids, vocab):
    """The text that N ids stand for."""
    return "".join(vocab[i] for i in ids)


def split(text, block_size, name="the text"):
    """The first 90 % of a text for training, the rest for validation. UserError if too short."""
    least = 10 * block_size + 1  # one window must fit into the validation part
    if len(text) < least:
        raise UserError(f"{name} has {len(text):,} characters, too few: it needs {least:,} or more")
    boundary = len(text) * 9 // 10
    return text[:boundary], text[boundary:]


def counted_bigram(train_ids, val_ids, vocab_size):
    """The losses of a counted bigram model: what the first of the five models should reach."""
    pairs = np.ones((vocab_size, vocab_size))  # (V, V); not zeros, so that no pair is impossible
    np.add.at(pairs, (train_ids[:-1], train_ids[1:]), 1)
    nll = -np.log(pairs / pairs.sum(axis=1, keepdims=True))  # (V, V)
    return [nll[ids[:-1], ids[1:]].mean() for ids in (train_ids, val_ids)]


# ------------------------------------------------------------------ the five models and their parts


@dataclass(frozen=True)
class Config:
    """The sizes of a model. The defaults are those of the five models that we grow here."""

    vocab_size: int
    block_size: int = 8  # how many characters the model can look at
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 65  # one for each character of Tiny Shakespeare
    dropout: float = 0.0  # the notebook trains with 0.2


class CausalSelfAttention(nn.Module):
    """Each position gathers information from itself and from the positions before it.

    This is the lecture's MultiHeadAttention (Vaswani et al., 2017), with one matrix for the
    queries, keys and values of all heads.
    """

    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0, "n_embd must be a multiple of n_head"
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):  # (B, T, C)
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, n_head, T, head_size) each
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, n_head, T, T)
        future = torch.ones(T, T, dtype=torch.bool).triu(1)  # (T, T)
        weights = scores.masked_fill(future, -math.inf).softmax(dim=-1)  # (B, n_head, T, T)
        out = self.dropout(weights) @ v  # (B, n_head, T, head_size)
        out = out.transpose(1, 2).reshape(B, T, C)  # (B, T, C)
        return self.dropout(self.proj(out))  # (B, T, C)


class FeedForward(nn.Module):
    """Each position thinks on its own about what it gathered."""

    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):  # (B, T, C)
        out = F.relu(self.up(x))  # (B, T, 4 C)
        return self.dropout(self.down(out))  # (B, T, C)


class Block(nn.Module):
    """Attention, then feed-forward. Each reads a normalized x and adds its result to x.

    generate_cached computes the same with a cache: if you change one, change the other.
    """

    def __init__(self, config):
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.attention = CausalSelfAttention(config)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.feed_forward = FeedForward(config)

    def forward(self, x):  # (B, T, C)
        x = x + self.attention(self.ln1(x))  # (B, T, C)
        return x + self.feed_forward(self.ln2(x))  # (B, T, C)


class Model(nn.Module):
    """Embeddings of characters and positions, then the given parts, then a logit per character."""

    def __init__(self, config, parts=(), final_norm=nn.Identity):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(part(config) for part in parts)  # in a GPT, all are blocks
        self.ln_f = final_norm(config.n_embd)  # nn.Identity ignores the size
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)

    def forward(self, idx):  # (B, T)
        positions = self.position_embedding.weight[: idx.shape[1]]  # (T, C)
        x = self.token_embedding(idx) + positions  # (B, T, C)
        for block in self.blocks:
            x = block(x)  # (B, T, C)
        return self.lm_head(self.ln_f(x))  # (B, T, V)


def gpt(config):
    """A GPT: n_layer blocks, and a last LayerNorm."""
    return Model(config, [Block] * config.n_layer, nn.LayerNorm)


RUNGS = (  # the steps from bigram to GPT: name, what it adds to the one before, how to make it
    ("bigram", "a table of logits", lambda c: nn.Embedding(c.vocab_size, c.vocab_size)),
    ("position", "token and position embedded", Model),
    ("attention", "positions talk", lambda c: Model(c, [CausalSelfAttention])),
    ("feed-forward", "positions think", lambda c: Model(c, [CausalSelfAttention, FeedForward])),
    ("block", "residuals and LayerNorm", gpt),
)


def initialize(make, config, seed):
    """A new model with orthogonal matrices (Saxe et al., 2014), drawn from the seed alone."""
    torch.manual_seed(seed)
    model = make(config)
    gains = {"token_embedding.weight": 2.0, "position_embedding.weight": 2.0, "lm_head.weight": 0.3}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            nn.init.orthogonal_(parameter, gains.get(name, 1.0))  # 0.3: nearly even odds at first
    return model


# --------------------------------------------------------------------------------------- training


@torch.inference_mode()
def exact_loss(model, ids, block_size, title=None):
    """The mean loss over all ids, (N,), except the first. A title adds a progress bar."""
    was_training, size = model.training, len(ids) - 1
    model.eval()  # dropout off
    padding = -size % block_size  # fills the last window; cross_entropy ignores targets of -100
    x = F.pad(ids[:-1], (0, padding)).view(-1, block_size)  # (N, T)
    y = F.pad(ids[1:], (0, padding), value=-100).view(-1, block_size)  # (N, T)
    rows, total = max(1, 2048 // block_size), 0.0  # the small models' batches fit a core's cache
    pairs = list(zip(x.split(rows), y.split(rows)))  # (B, T) each
    for inputs, targets in tqdm(pairs, title, leave=False, disable=None if title else True):
        logits = model(inputs).flatten(0, 1)  # (B * T, V)
        total += F.cross_entropy(logits, targets.flatten(), reduction="sum").item()
    model.train(was_training)
    return total / size


def batches(ids, block_size, batch_size, seed):
    """Yield (B, T) inputs and targets forever. Inputs do not overlap; an epoch has each once."""
    windows = ids.unfold(0, block_size + 1, block_size)  # (N, T + 1)
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(windows), generator=generator).split(batch_size):  # (B,)
            batch = windows[rows]  # (B, T + 1)
            yield batch[:, :-1], batch[:, 1:]


def train(model, train_ids, val_ids, block_size, steps, seed, title=None, max_lr=5e-3):
    """Train a model, then load the weights that had the lowest validation loss on the way.

    Returns the validation losses, [(step, loss), ...], and a dict: step, losses and seed of these
    weights. The optimizer is AdamW (Loshchilov and Hutter, 2019).
    """
    # lm_head learns better at a higher rate than the rest. Both rates fall to zero. The first beta
    # is 0.7, not 0.9: the running average of the gradients spans about 3 batches, not about 10.
    head = [parameter for name, parameter in model.named_parameters() if "lm_head" in name]
    rest = [parameter for name, parameter in model.named_parameters() if "lm_head" not in name]
    groups = [{"params": rest, "lr": max_lr}, {"params": head, "lr": 5 * max_lr}]
    optimizer = torch.optim.AdamW(groups, betas=(0.7, 0.99), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    eval_steps = {math.ceil(steps * part) for part in (1 / 30, 1 / 10, 1 / 3, 1)}  # on a log scale
    curve, best_step, best_loss, best = [], 0, math.inf, None
    bar = tqdm(range(1, steps + 1), title, leave=False, disable=None)  # only in a terminal
    for step, (x, y) in zip(bar, batches(train_ids, block_size, 32, seed)):
        logits = model(x)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step in eval_steps:
            val_loss = exact_loss(model, val_ids, block_size)
            assert math.isfinite(val_loss), f"no loss at step {step} ({title}): lower max_lr"
            curve.append((step, val_loss))
            if val_loss < best_loss:
                best_step, best_loss, best = step, val_loss, copy.deepcopy(model.state_dict())
    model.load_state_dict(best)
    train_loss = exact_loss(model, train_ids, block_size)
    return curve, {"step": best_step, "train_loss": train_loss, "val_loss": best_loss, "seed": seed}


# --------------------------------------------------------------------------------------- sampling


@torch.inference_mode()
def generate(model, idx, block_size, max_new_tokens, generator=None):
    """Continue idx, (B, T), as in the lecture: yield the next id of each row, (B,), many times."""
    model.eval()
    for _ in range(max_new_tokens):
        logits = model(idx[:, -block_size:])[:, -1]  # (B, V)
        new = choose(logits, generator=generator)  # (B, 1)
        yield new[:, 0]
        idx = torch.cat((idx, new), dim=1)  # (B, T + 1)


def choose(logits, temperature=1.0, top_k=0, generator=None):
    """Draw an id for each row of logits: (B, V) in, (B, 1) out. Temperature 0 takes the likeliest.

    With top_k, only that many of the likeliest can be drawn; 0 means no limit.
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k:
        kept = logits.topk(min(top_k, logits.shape[-1]))  # (B, top_k), not more if some are equal
        logits = torch.full_like(logits, -math.inf).scatter(-1, kept.indices, kept.values)
    logits = (logits - logits.amax(dim=-1, keepdim=True)).double()  # (B, V): <= 0, no overflow
    return torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)


@torch.inference_mode()
def generate_cached(model, idx, max_new_tokens, temperature=1.0, top_k=0, generator=None):
    """Continue idx, (B, T), as generate does, but compute only the newest position. For a GPT.

    Each block keeps the keys and values of earlier positions in a cache. They already contain their
    position embeddings, so they cannot be shifted: when the window is full, we start again with its
    last half. UserError if the logits are not finite.
    """
    block_size = model.config.block_size
    n_head = model.config.n_head
    C = model.config.n_embd
    head_size = C // n_head
    layers = []  # the tensors of each block: using them is faster than calling its modules
    for block in model.blocks:
        parts = [
            block.ln1,
            block.attention.qkv,
            block.attention.proj,
            block.ln2,
            block.feed_forward.up,
            block.feed_forward.down,
        ]
        tensors = [tuple(part.parameters()) for part in parts]  # (weight, bias); qkv has no bias
        keys = torch.empty(len(idx), n_head, block_size, head_size)
        values = torch.empty_like(keys)
        layers.append((*tensors, keys, values))

    unread = idx[:, -block_size:]  # (B, T): what is not in the cache yet
    start = 0  # the position of its first character
    for _ in range(max_new_tokens):
        if start == block_size:
            unread = idx[:, -max(1, block_size // 2) :]  # (B, T)
            start = 0
        B, T = unread.shape
        end = start + T
        x = model.token_embedding(unread) + model.position_embedding.weight[start:end]  # (B, T, C)

        # This is Block.forward, with the cache and without dropout.
        for ln1, qkv, proj, ln2, up, down, keys, values in layers:
            out = F.layer_norm(x, (C,), *ln1)
            out = F.linear(out, *qkv).view(B, T, 3, n_head, head_size)
            q, k, v = out.permute(2, 0, 3, 1, 4)  # (B, n_head, T, head_size) each
            keys[:, :, start:end] = k
            values[:, :, start:end] = v
            k = keys[:, :, :end]  # (B, n_head, S, head_size)
            v = values[:, :, :end]  # (B, n_head, S, head_size)
            # Only at the start of a window is T more than 1, so that the future must be masked.
            out = F.scaled_dot_product_attention(q, k, v, is_causal=start == 0)
            out = out.transpose(1, 2).reshape(B, T, C)  # (B, T, C)
            x = x + F.linear(out, *proj)  # (B, T, C)

            out = F.layer_norm(x, (C,), *ln2)
            out = F.relu(F.linear(out, *up))  # (B, T, 4 C)
            x = x + F.linear(out, *down)  # (B, T, C)

        logits = model.lm_head(model.ln_f(x[:, -1]))  # (B, V)
        if not math.isfinite(logits.sum()):  # inf and nan survive a sum
            raise UserError("the weights are damaged: they give logits that are not finite")
        start = end
        unread = choose(logits, temperature, top_k, generator)  # (B, 1)
        yield unread[:, 0]
        idx = torch.cat((idx, unread), dim=1)[:, -block_size:]  # (B, N)


# --------------------------------------------------------------------- files: texts and checkpoints


class UserError(Exception):
    """A mistake that the user can correct: main() prints it as one line."""


def write_file(path, content):
    """Write bytes to a file. If this fails or is interrupted, the old file is still there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        if error.filename2:  # from os.replace: Windows refuses it if another program has path open
            raise UserError(f"cannot replace {path} ({error.strerror}): the new one is {temporary}")
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def download_text():
    """Save Tiny Shakespeare, all of it or nothing. ConnectionError if it does not arrive."""
    remedy = f"try again, or save it yourself as {TEXT}"
    try:
        content = urlopen(URL, timeout=30).read()  # gives up after 30 s of silence
    except Exception as error:  # no network, no HTTP, no certificates, ...
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            remedy = f"run Applications/Python's 'Install Certificates.command' (Mac), or {remedy}"
        raise ConnectionError(f"cannot download {URL} ({error}): {remedy}") from None
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UserError(f"{URL} sent something other than Tiny Shakespeare: {remedy}")
    write_file(TEXT, content)


def read_text(path):
    """Read a UTF-8 text. Tiny Shakespeare is downloaded if it is not there yet."""
    if path.absolute() == TEXT and not path.exists():
        download_text()
    try:
        text = path.read_text(encoding="utf-8-sig")  # line ends of Windows become \n
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8: convert it") from None
    if path.absolute() == TEXT and hashlib.sha256(text.encode()).hexdigest() != SHA256:
        print(f"{path} is not Tiny Shakespeare: delete it to download that", file=sys.stderr)
    return text


def save(path, model, vocab, training):
    """Write a checkpoint: all that is needed to use the model, as tensors and plain types."""
    parts = {"config": asdict(model.config), "vocab": vocab, "model": dict(model.state_dict())}
    torch.save(parts | {"training": training}, buffer := io.BytesIO())
    write_file(path, buffer.getbuffer())


def load(path, text_path=TEXT):
    """The model, vocabulary and training record in a checkpoint, ours or the lecture's."""
    if not path.is_file():
        raise UserError(f"no file {path}: check its name, or grow a model first (one-block.pt)")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
        if isinstance(checkpoint, dict) and "vocab" in checkpoint:
            return build(checkpoint)
        return build_lecture(checkpoint, read_text(text_path))
    except Exception as error:  # a damaged file makes torch.load raise almost anything
        if isinstance(error, (UserError, ConnectionError)) or getattr(error, "filename", None):
            raise  # the problem is a text or access to a file, not what the checkpoint holds
        if "weights_only" in str(error):  # torch advises to do without
            error = "it is not what torch.save(model.state_dict(), ...) writes"
        raise UserError(f"{path} is damaged, empty or another model: {error!s:.300}") from None


def build(checkpoint):
    """The model, vocabulary and training record in a dict. All shapes must fit."""
    model, weights = gpt(Config(**checkpoint["config"])), checkpoint["model"]
    if "ln_f.weight" not in weights:  # some who typed the lecture's code never used it
        model.ln_f = nn.Identity()
    model.load_state_dict(weights)
    vocab, V = checkpoint["vocab"], model.config.vocab_size
    if len(vocab) != V:
        raise UserError(f"the model knows {V} characters, the text has {len(vocab)}: see --input")
    model.eval()(torch.zeros(1, 1, dtype=torch.long))  # fails if a size is impossible (n_head -1)
    return model, vocab, dict(checkpoint["training"])


def build_lecture(checkpoint, text):
    """As build, for the lecture's weights and the vocabulary of a text; prints their loss on it."""
    import lecture  # GitHub and video scale attention scores differently: it converts for both

    vocab = vocabulary(text)
    versions = [build(version) for version in lecture.convert(checkpoint, vocab)]
    ids, untrained = encode(text[:5000], vocab), math.log(len(vocab))
    losses = [exact_loss(model, ids, model.config.block_size) for model, *_ in versions]
    best = 1 if losses[1] < min(0.98 * losses[0], 0.8 * untrained) else 0  # in doubt, GitHub's
    code, loss = ("code on GitHub", "video or Colab notebook")[best], losses[best]
    doubt = "" if loss < 0.8 * untrained else "; WARNING: another text, or a changed model?"
    print(f"weights that fit the lecture's {code}: loss {loss:.2f} on the first {len(ids):,} "
          f"characters ({untrained:.2f} if untrained){doubt}", file=sys.stderr)  # fmt: skip
    return versions[best]


# ------------------------------------------------------------------------------------ three actions


def grow(args):
    """Train five models: print a table and samples, save growth.png and one-block.pt."""
    try:
        text = read_text(args.input)
    except ConnectionError as error:
        print(f"WARNING: {error}\nWARNING: using {FALLBACK}, so losses differ", file=sys.stderr)
        args.input, text = FALLBACK, read_text(FALLBACK)
    vocab, name = vocabulary(text), args.input.name
    config, seed = Config(len(vocab)), 1337 if args.seed is None else args.seed
    splits = [encode(part, vocab) for part in split(text, config.block_size, args.input)]
    args.out.mkdir(parents=True, exist_ok=True)
    (probe := args.out / f".one-block.pt.{os.getpid()}").touch()  # fails now, not after training
    probe.unlink()
    torch.set_num_threads(1)  # a core for each model; more would change its weights a little
    print(f"{name}: {len(text):,} characters, {len(vocab)} of them distinct\n")
    counted = counted_bigram(*splits, len(vocab))
    grown = grow_rungs(config, *splits, counted, args.steps, seed)
    _, model, _, training = grown[-1]
    training |= {"device": "cpu", "torch": str(torch.__version__), "text": name}
    save(args.out / "one-block.pt", model, vocab, training)
    draw(args.out / "growth.png", grown, counted[1], name)
    print(f"wrote one-block.pt and growth.png to {args.out.resolve()}", file=sys.stderr)
    print("\n60 characters from each (↵ is a new line):\n")
    start = torch.zeros(1, 1, dtype=torch.long)
    for title, each, _, _ in grown:
        ids = generate(each, start, config.block_size, 60, torch.Generator().manual_seed(seed))
        print(f"{title:14}", decode(ids, vocab).replace("\n", "↵"))
    ids = generate(model, start, config.block_size, 500, torch.Generator().manual_seed(seed))
    print(f"\n500 characters from the last model:\n\n{decode(ids, vocab)}")


def grow_rungs(config, train_ids, val_ids, counted, steps, seed):
    """Train each model on a core; print a table, return [(title, model, curve, training), ...]."""
    row = "{:14} {:27} {:>10} {:>8} {:>8}".format
    print(row("rung", "adds", "parameters", "train", "val"))
    print(row("0 counting", "pairs counted, not trained", "", *map("{:.4f}".format, counted)))
    titles = [f"{i} {name}" for i, (name, _, _) in enumerate(RUNGS, start=1)]
    models, grown = [initialize(make, config, seed) for _, _, make in RUNGS], []
    common = train_ids, val_ids, config.block_size, steps, seed
    pool = ThreadPoolExecutor(os.cpu_count())  # faster than all cores on one model
    results = pool.map(lambda model, title: train(model, *common, title), models, titles)
    for title, (_, adds, _), model, (curve, training) in zip(titles, RUNGS, models, results):
        size = f"{sum(parameter.numel() for parameter in model.parameters()):,}"
        losses = f"{training['train_loss']:.4f}", f"{training['val_loss']:.4f}"
        tqdm.write("\r" * sys.stdout.isatty() + row(title, adds, size, *losses))  # after a bar
        grown.append((title, model, curve, training))
    return grown


def draw(path, grown, counted, name):
    """Plot the validation losses. A label gives the loss of the weights that a model keeps."""
    from matplotlib.figure import Figure  # takes half a second, which sampling need not wait for

    axes = Figure(figsize=(9, 5), layout="constrained").subplots()
    # The colours of Okabe and Ito: colour-blind readers can tell them apart.
    axes.set_prop_cycle(color=["#E69F00", "#56B4E9", "#D55E00", "#009E73", "#0072B2", "#CC79A7"])
    axes.axhline(counted, linestyle=":", color="black")
    steps = [step for step, _ in grown[0][2]]
    labels = [(counted, steps[-1], "0 counting", "black")]
    for title, _, curve, training in grown:
        [line] = axes.plot(*zip(*curve), "o-")
        labels.append((training["val_loss"], training["step"], title, line.get_color()))
    low, high, height = min(labels)[0], max(labels)[0], 0
    span = max(high - low, 0.1)
    for loss, step, title, color in sorted(labels):
        height = max(loss, height + 0.07 * span)  # labels must not cover each other
        arrow = {"arrowstyle": "-", "color": color, "relpos": (0, 0.5)}
        axes.annotate(f"{loss:.3f}  {title}", (step, loss), (1.03, height), arrowprops=arrow,
                      textcoords=axes.get_yaxis_transform(), va="center")  # fmt: skip
    axes.set(xscale="log", xlim=(0.9 * steps[0], 1.1 * steps[-1]), xlabel="iteration",
             ylim=(low - 0.1 * span, high + 0.6 * span), ylabel="nats per character")  # fmt: skip
    axes.set_xticks(steps, steps)
    axes.minorticks_off()
    axes.set_title(f"What each idea adds: validation loss on {ascii(name)}", parse_math=False)
    axes.figure.savefig(buffer := io.BytesIO(), format="png", dpi=150)
    write_file(path, buffer.getbuffer())


def sample(args):
    """Continue a prompt: print one text while it is drawn, or several, drawn as one batch."""
    model, vocab, _ = load(args.weights, args.input)
    prompt = open(os.dup(0), encoding="utf-8-sig").read() if args.prompt == "-" else args.prompt
    seed = torch.seed() % 2**32 if args.seed is None else args.seed
    idx = encode(prompt or vocab[0], vocab).repeat(args.samples, 1)  # (B, T), T at least 1
    options = args.temperature, args.top_k, torch.Generator().manual_seed(seed)
    drawn, began = generate_cached(model, idx, args.tokens, *options), time.perf_counter()
    if args.samples == 1:
        print(prompt, end="", flush=True)
        for ids in drawn:  # (1,)
            print(vocab[ids[0]], end="", flush=True)
    else:
        texts = zip(*(ids.tolist() for ids in drawn))  # one for each row
        print(f"\n{'-' * 40}\n".join(prompt + decode(ids, vocab) for ids in texts), end="")
    speed = args.samples * args.tokens / (time.perf_counter() - began)
    print("\n" if sys.stdout.isatty() else "", end="", flush=True)
    print(f"{speed:,.0f} characters per second, seed {seed}", file=sys.stderr)


def evaluate(args):
    """Print a checkpoint's exact losses on both parts of a text, next to those in its file."""
    model, vocab, training = load(args.weights, args.input)
    parts = split(read_text(args.input), block_size := model.config.block_size, args.input)
    splits = [encode(part, vocab, args.input) for part in parts]
    print(f"{'loss on ' + args.input.name:24} measured  in the file  bits/char  perplexity")
    for title, key, ids in zip(("train", "validation"), ("train_loss", "val_loss"), splits):
        loss = exact_loss(model, ids, block_size, title)
        stored = f"{training[key]:.4f}" if isinstance(training.get(key), float) else "nothing"
        bits, perplexity = loss / math.log(2), torch.tensor(loss).exp()  # inf is no error here
        print(f"{title:24}{loss:9.4f}{stored:>13}{bits:11.4f}{perplexity:12.4f}")


# ------------------------------------------------------------------------------------ command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        hint = "; with a dash: --option=-value" if "expected one argument" in message else ""
        raise UserError(f"{message}{hint} (ACTION --help lists the options)")


def parse(argv):
    """The action and the options of a command line. Without an action, it is grow."""
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["grow", *argv]
    options = {
        "input": {"type": Path, "default": TEXT, "help": "a UTF-8 text (Tiny Shakespeare)"},
        "steps": {"type": int, "default": 3000, "help": "iterations per model (3000)"},
        "seed": {"type": int, "help": "the same seed gives the same result (grow: 1337)"},
        "out": {"type": Path, "default": Path(), "help": "folder for the files (current one)"},
        "weights": {"type": Path, "default": WEIGHTS, "help": f"a checkpoint ({WEIGHTS.name})"},
        "prompt": {"default": "", "help": "what to continue; - reads it from stdin"},
        "tokens": {"type": int, "default": 500, "help": "how many characters (500)"},
        "temperature": {"type": float, "default": 0.8, "help": "0 takes the likeliest (0.8)"},
        "top-k": {"type": int, "default": 0, "help": "draw from the TOP_K likeliest (0: from all)"},
        "samples": {"type": int, "default": 1, "help": "how many texts (1)"},
    }
    parser = Parser(description="Grow a bigram table into a GPT. Each action has its own --help.")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    for run, names in (
        (grow, "input steps seed out"),
        (sample, "weights input prompt tokens temperature top-k seed samples"),
        (evaluate, "weights input"),
    ):
        action = actions.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        action.set_defaults(run=run)
        for name in names.split():
            action.add_argument(f"--{name}", **options[name])
    args = parser.parse_args(argv)
    least = {"steps": 1, "tokens": 1, "samples": 1, "top_k": 0, "seed": 0, "temperature": 0}
    for name, low in least.items():
        high, value = (256 if name == "samples" else 2**32), getattr(args, name, None)
        if value is not None and not low <= value <= high:  # refuses nan as well
            parser.error(f"--{name.replace('_', '-')} {value}: it must be from {low} to {high:,}")
    return args


def main(argv):
    """Run an action and return the exit status: 2 if the user has something to correct."""
    try:
        args = parse(argv)
        args.run(args)
        return 0
    except (UserError, OSError, UnicodeError, ImportError) as error:
        closed = (errno.EPIPE, errno.EINVAL) if os.name == "nt" else (errno.EPIPE,)
        if getattr(error, "errno", 0) in closed and not error.filename:  # stdout, as by `| head`
            return 141  # 128 + 13: the status of a program that SIGPIPE ends
        print("error:", *str(error).split(), file=sys.stderr)
        return 2


if __name__ == "__main__":
    if hasattr(sys, "ps1") or not hasattr(sys.stdout, "reconfigure"):
        threads = torch.get_num_threads()
        try:
            main(sys.argv[1:])  # do not exit: this is IPython, Jupyter (%run) or IDLE
        finally:  # after the stop button, too
            torch.set_num_threads(threads)
    else:
        redirected = {} if sys.stdout.isatty() else {"encoding": "utf-8", "newline": "\n"}
        sys.stdout.reconfigure(errors="replace", line_buffering=True, **redirected)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the program at once
        tqdm.set_lock(threading.RLock())  # its own lock would outlive os._exit, with a warning
        os._exit(main(sys.argv[1:]))  # torch takes 0.3 s or more to end in the usual way
