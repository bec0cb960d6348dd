"""Grow a bigram table into a GPT, one idea at a time, on a CPU.

    python bigram-to-gpt.py             train five models; save the last one and a plot
    python bigram-to-gpt.py sample      let the large model write, or --weights one-block.pt
    python bigram-to-gpt.py evaluate    measure the loss of such a model on a text

For people who have just watched Andrej Karpathy's lecture "Let's build GPT: from scratch, in code,
spelled out". Losses are in nats per character: the mean of -ln(probability that the model gave to
the character that really came). Comments at the ends of lines give shapes:

    B  sequences in a batch             T  positions in a sequence      C  channels (n_embd)
    V  characters in the vocabulary     S  positions to attend to       N  any number
"""

import argparse
import errno
import hashlib
import io
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import cycle, repeat
from pathlib import Path
from urllib.request import urlopen

# Must come before torch is imported. On Linux, its waiting threads then free their cores sooner.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

# The numbers of training. The sizes of the models are in Config, below.
BATCH_SIZE = 32
STEPS = 3000
LEARNING_RATE = 5e-3  # at the start: it falls to zero in a straight line
HEAD_FACTOR = 5  # lm_head, the last layer, learns better at so many times this rate
BETAS = (0.7, 0.99)  # of AdamW: 0.7 averages gradients over some 3 steps, the usual 0.9 over 10
EVAL_AT = (1 / 30, 1 / 10, 1 / 3, 1)  # of all steps: with 3000, after 100, 300, 1000 and 3000
SEED = 1337

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE / "gpt_shakespeare.pt"  # the large model, trained in model.ipynb
TEXT = HERE / "input.txt"  # Tiny Shakespeare, downloaded when it is first needed


class UserError(Exception):
    """A mistake that the user can correct: main() prints it as one line."""


# ------------------------------------------------------------------------------- characters to ids
def vocabulary(text):
    """All distinct characters of a text, sorted. A character's place in this string is its id."""
    return "".join(sorted(set(text)))


def encode(text, vocab, name="the prompt"):
    """The ids of N characters, (N,). UserError if the vocabulary lacks one of them."""
    unknown = "".join(sorted(set(text) - set(vocab)))
    if unknown:
        raise UserError(f"{name} has {unknown[:99]!r}, the model only knows {vocab[:999]!r}")
    id_of = {character: i for i, character in enumerate(vocab)}
    return torch.tensor([id_of[character] for character in text], dtype=torch.long)


def decode(ids, vocab):
    """The text that N ids stand for."""
    return "".join(vocab[i] for i in ids)


def split(ids, block_size, name="the text"):
    """The first 90 % of ids for training, the rest for validation. UserError if too few."""
    least = 10 * block_size + 1  # one window must fit into the validation part
    if len(ids) < least:
        raise UserError(f"{name} has {len(ids):,} characters, but needs {least:,} or more")
    boundary = len(ids) * 9 // 10
    return ids[:boundary], ids[boundary:]


def counted_bigram(train_ids, val_ids, vocab_size):
    """Both losses of a bigram model that is counted, not trained. Training should reach them."""
    train, val = train_ids.numpy(), val_ids.numpy()  # (N,) each
    counts = np.ones((vocab_size, vocab_size))  # (V, V); not zeros: no pair is impossible
    np.add.at(counts, (train[:-1], train[1:]), 1)  # counts a pair each time, which += would not
    nll = -np.log(counts / counts.sum(axis=1, keepdims=True))  # (V, V), negative log likelihoods
    return nll[train[:-1], train[1:]].mean(), nll[val[:-1], val[1:]].mean()


# ------------------------------------------------------------------ the five models and their parts
@dataclass(frozen=True)
class Config:
    """The sizes of a model. The defaults are those of the five models that we grow here."""

    vocab_size: int
    block_size: int = 8  # how many characters the model can look at
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 65  # as many as Tiny Shakespeare has different characters
    dropout: float = 0.0  # the notebook has 0.2; here, models in threads share one random generator


class Bigram(nn.Embedding):
    """A table: the row of a character has the logits of the character that follows it."""

    def __init__(self, config):
        super().__init__(config.vocab_size, config.vocab_size)
        self.config = config


class CausalSelfAttention(nn.Module):
    """Each position gathers information from those up to itself (Vaswani et al., 2017)."""

    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0, "n_embd must be a multiple of n_head"
        self.n_head = config.n_head
        # The lecture has three matrices for each head. This one makes all queries, keys and values.
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
    """Attention, then feed-forward. Each reads a normalized x and adds its result to x."""

    def __init__(self, config):
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.attention = CausalSelfAttention(config)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.feed_forward = FeedForward(config)

    # generate_cached repeats this and the modules that it calls: if you change one, change both.
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


Rung = namedtuple("Rung", "name, adds, make")  # a step to GPT; make(config) gives its model
RUNGS = [  # yours go in between: the first must be a bigram, and a GPT is loaded from the last
    Rung("bigram", "a table of logits", Bigram),
    Rung("position", "token and position embedded", Model),
    Rung("attention", "positions talk", lambda c: Model(c, [CausalSelfAttention])),
    Rung("feed-forward", "positions think", lambda c: Model(c, [CausalSelfAttention, FeedForward])),
    Rung("block", "residuals and LayerNorm", gpt),
]


def initialize(make, config, seed):
    """A new model with orthogonal matrices (Saxe et al., 2014), drawn from the seed alone."""
    # Gains scale the matrices. 2.0 was better than 1.0 and 4.0. With 0.3, all odds begin as equal.
    gains = {"token_embedding.weight": 2.0, "position_embedding.weight": 2.0, "lm_head.weight": 0.3}
    torch.manual_seed(seed)
    model = make(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            nn.init.orthogonal_(parameter, gains.get(name, 1.0))
    return model


# --------------------------------------------------------------------------------------- training
def progress(items, title):  # a bar, if it has a title and all goes to a terminal
    shown = title and sys.stdout.isatty() and sys.stderr.isatty()
    return tqdm(items, title, leave=False, disable=not shown)


@torch.inference_mode()
def exact_loss(model, ids, title=None):
    """The mean loss over all ids, (N,), except the first. Leaves the model in eval mode."""
    model.eval()  # no dropout
    block_size = model.config.block_size
    count = len(ids) - 1
    padding = (-count) % block_size  # fills the last window; cross_entropy ignores targets of -100
    x = F.pad(ids[:-1], (0, padding)).view(-1, block_size)  # (N, T)
    y = F.pad(ids[1:], (0, padding), value=-100).view(-1, block_size)  # (N, T)
    rows = max(1, 2048 // block_size)  # some 2048 characters at a time are fast on a CPU
    batches = list(zip(x.split(rows), y.split(rows)))  # (B, T) each
    total = 0.0
    for inputs, targets in progress(batches, title):
        logits = model(inputs).flatten(0, 1)  # (B * T, V)
        total += F.cross_entropy(logits, targets.flatten(), reduction="sum").item()
    return total / count


def shuffled_batches(ids, block_size, batch_size, seed):
    """Yield (B, T) inputs and targets forever."""
    # The lecture draws windows at random places. Our inputs do not overlap, and come in random
    # order: 3000 steps take three quarters of Tiny Shakespeare's, so none comes twice.
    windows = ids.unfold(0, block_size + 1, block_size)  # (N, T + 1)
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(windows), generator=generator)  # (N,)
        for rows in order.split(batch_size):  # (B,)
            batch = windows[rows]  # (B, T + 1)
            yield batch[:, :-1], batch[:, 1:]


def train(model, train_ids, val_ids, steps, seed, title=None):
    """Train a model, then load the weights that had the lowest validation loss on the way.

    Returns the validation losses, [(step, loss), ...], and a dict: step, losses and seed of these
    weights. The optimizer is AdamW (Loshchilov and Hutter, 2019).
    """
    head = [param for name, param in model.named_parameters() if "lm_head" in name]
    rest = [param for name, param in model.named_parameters() if "lm_head" not in name]
    optimizer = torch.optim.AdamW(rest, LEARNING_RATE, BETAS, fused=True)
    optimizer.add_param_group({"params": head, "lr": HEAD_FACTOR * LEARNING_RATE})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    eval_steps = [math.ceil(part * steps) for part in EVAL_AT]
    batches = shuffled_batches(train_ids, model.config.block_size, BATCH_SIZE, seed)
    curve = []
    best_loss = math.inf
    for step in progress(range(1, steps + 1), title):
        x, y = next(batches)  # (B, T) each
        model.train()  # exact_loss has turned dropout off
        logits = model(x)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step in eval_steps:
            val_loss = exact_loss(model, val_ids)
            assert math.isfinite(val_loss), f"no loss at step {step} ({title}): lower LEARNING_RATE"
            curve.append((step, val_loss))
            if val_loss < best_loss:
                best_step, best_loss = step, val_loss
                best = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(best)
    train_loss = exact_loss(model, train_ids)
    return curve, {"step": best_step, "train_loss": train_loss, "val_loss": best_loss, "seed": seed}


# --------------------------------------------------------------------------------------- sampling
@torch.inference_mode()
def generate(model, idx, max_new_tokens, generator=None):
    """Continue idx, (B, T), as in the lecture: yield the next ids, (B,), max_new_tokens times."""
    model.eval()
    for _ in range(max_new_tokens):
        logits = model(idx[:, -model.config.block_size :])[:, -1]  # (B, V)
        new = choose(logits, generator=generator)  # (B, 1)
        yield new[:, 0]
        idx = torch.cat((idx, new), dim=1)  # (B, T + 1)


def choose(logits, temperature=1.0, top_k=0, generator=None):
    """Draw an id, (B, 1), for each row of logits, (B, V). Temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k > 0:  # all but the top_k highest become -inf; 0 means no limit
        kept = logits.topk(min(top_k, logits.shape[-1]))  # (B, top_k)
        logits = torch.full_like(logits, -math.inf).scatter(-1, kept.indices, kept.values)
    probabilities = (logits / temperature).softmax(dim=-1)  # (B, V)
    return torch.multinomial(probabilities, 1, generator=generator)


@torch.inference_mode()
def generate_cached(model, idx, max_new_tokens, temperature=1.0, top_k=0, generator=None):
    """Continue idx, (B, T), but compute each position of a window only once. For a GPT.

    Each block caches keys and values. They depend on the place in the window: when it is full, we
    go on from its last half, where generate moves by one. UserError if logits are not finite.
    """
    block_size = model.config.block_size
    n_head = model.config.n_head
    C = model.config.n_embd
    head_size = C // n_head
    layers = []  # the tensors of each block: using them is faster than calling its modules
    for block in model.blocks:
        parts = [block.ln1, block.attention.qkv, block.attention.proj]
        parts += [block.ln2, block.feed_forward.up, block.feed_forward.down]
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
            k, v = keys[:, :, :end], values[:, :, :end]  # (B, n_head, S, head_size) each
            # At the start there are T positions, which must not see later ones. Then there is one.
            out = F.scaled_dot_product_attention(q, k, v, is_causal=(start == 0))
            out = out.transpose(1, 2).reshape(B, T, C)  # (B, T, C)
            x = x + F.linear(out, *proj)  # (B, T, C)

            out = F.layer_norm(x, (C,), *ln2)
            out = F.relu(F.linear(out, *up))  # (B, T, 4 C)
            x = x + F.linear(out, *down)  # (B, T, C)

        logits = model.lm_head(model.ln_f(x[:, -1]))  # (B, V)
        if not math.isfinite(logits.sum()):  # inf and nan survive a sum
            raise UserError("these weights give logits that are not finite")
        start = end
        unread = choose(logits, temperature, top_k, generator)  # (B, 1)
        yield unread[:, 0]
        idx = torch.cat((idx, unread), dim=1)[:, -block_size:]  # (B, N)


# --------------------------------------------------------------------- files: texts and checkpoints
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# Without a network. The large model wrote it: sample --tokens 500000 --seed 1 --temperature 1
FALLBACK = HERE / "assets" / "more.txt"


def write_file(path, write):
    """Make a file of what write(file) writes. If this fails, an earlier file is still whole."""
    buffer = io.BytesIO()
    write(buffer)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(buffer.getbuffer())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def download_text():
    """Save Tiny Shakespeare, all of it or nothing. ConnectionError if it does not arrive."""
    try:
        content = urlopen(URL, timeout=30).read()  # gives up after 30 s of silence
        if hashlib.sha256(content).hexdigest() != SHA256:
            raise ValueError("another text arrived")
    except Exception as error:  # no network, no HTTP, no certificates, ...
        raise ConnectionError(f"cannot download {URL} ({error}): save it yourself as {TEXT}")
    write_file(TEXT, lambda file: file.write(content))


def read_text(path):
    """Read a UTF-8 text. Tiny Shakespeare is downloaded if it is not there yet."""
    if path.resolve() == TEXT and not path.exists():
        download_text()
    try:
        return path.read_text(encoding="utf-8-sig")  # no BOM; Windows' line ends become \n
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8: convert it") from None


def save(path, model, vocab, training):
    """Write a checkpoint: all that is needed to use the model, as tensors and plain types."""
    checkpoint = {"config": asdict(model.config), "vocab": vocab}
    checkpoint |= {"model": dict(model.state_dict()), "training": training}
    write_file(path, lambda file: torch.save(checkpoint, file))


def load(path, text_path=TEXT):
    """The model, vocabulary and training record of a file. The lecture's files need a text."""
    content = io.BytesIO(path.read_bytes())
    try:
        checkpoint = torch.load(content, map_location="cpu", weights_only=True)  # runs no code
    except Exception:  # a damaged file makes torch.load raise almost anything
        raise UserError(f"{path} is damaged, or has Python objects: save model.state_dict()")
    try:
        parts = checkpoint if isinstance(checkpoint, dict) else {}
        if "config" not in parts or "blocks.0.feed_forward.up.weight" not in parts.get("model", ()):
            import lecture  # recognises the layers in files from the lecture's code

            checkpoint, notice = lecture.convert(checkpoint, read_text(text_path), loss_of)
            print(notice, file=sys.stderr)
        return build(checkpoint)
    except (UserError, OSError, ImportError):  # these say what is missing: a text or lecture.py
        raise
    except Exception as error:  # whatever does not fit
        raise UserError(f"cannot use {path}: {error!s:.300}") from None


def build(checkpoint):
    """The model, vocabulary and training record in a dict. All shapes must fit."""
    model = gpt(Config(**checkpoint["config"]))
    if "ln_f.weight" not in checkpoint["model"]:  # some of the lecture's models have none
        model.ln_f = nn.Identity()
    model.load_state_dict(checkpoint["model"])
    return model.eval(), checkpoint["vocab"], dict(checkpoint["training"])


def loss_of(checkpoint, text):
    """The loss that the model in a dict has on a text."""
    model, vocab, _ = build(checkpoint)
    return exact_loss(model, encode(text, vocab, "the text"))


# ------------------------------------------------------------------------------------ three actions
Grown = namedtuple("Grown", "title, model, curve, training")  # train returned the last two


def grow(args):
    """Train five models: print a table and samples, save growth.png and one-block.pt."""
    from matplotlib.figure import Figure  # takes half a second, which sampling need not wait for

    path = args.input
    try:
        text = read_text(path)
    except ConnectionError as error:
        path = FALLBACK
        text = read_text(path)
        print(f"WARNING: {error}; using {path}, so losses differ", file=sys.stderr)
    vocab = vocabulary(text)
    if len(vocab) > 10_000:  # counting needs a table of V x V
        raise UserError(f"{path} has {len(vocab):,} different characters: 10,000 at most")
    config = Config(len(vocab))
    train_ids, val_ids = split(encode(text, vocab), config.block_size, path)  # (N,) each
    args.out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.out).close()  # fails now, not after training
    print(f"{path.name}: {len(text):,} characters, {len(vocab)} of them distinct\n")
    row = "{:14} {:27} {:>10} {:>8} {:>8}".format
    print(row("rung", "adds", "parameters", "train", "val"))
    counted = counted_bigram(train_ids, val_ids, len(vocab))
    print(row("0 counting", "pairs counted, not trained", "", *map("{:.4f}".format, counted)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # per model: two would add in another order and round differently
    models = [initialize(rung.make, config, args.seed) for rung in RUNGS]
    titles = [f"{number} {rung.name}" for number, rung in enumerate(RUNGS, start=1)]
    same = [repeat(value) for value in (train_ids, val_ids, args.steps, args.seed)]
    results = ThreadPoolExecutor(os.cpu_count()).map(train, models, *same, titles)
    grown = []
    for rung, title, model, (curve, training) in zip(RUNGS, titles, models, results):
        grown.append(Grown(title, model, curve, training))
        parameters = f"{sum(parameter.numel() for parameter in model.parameters()):,}"
        losses = [f"{training[key]:.4f}" for key in ("train_loss", "val_loss")]
        if sys.stdout.isatty():
            print(end="\r")  # a bar that ended may have left the cursor anywhere
        tqdm.write(row(title, rung.adds, parameters, *losses))
    torch.set_num_threads(threads)  # a notebook may go on

    origin = {"device": "cpu", "torch": str(torch.__version__), "text": path.name}
    save(args.out / "one-block.pt", grown[-1].model, vocab, grown[-1].training | origin)
    is_tiny_shakespeare = hashlib.sha256(text.encode()).hexdigest() == SHA256
    name = "Tiny Shakespeare" if is_tiny_shakespeare else ascii(path.name)
    figure = Figure(figsize=(9, 5), layout="constrained")
    figure.suptitle(f"What each idea adds: validation loss on {name}", parse_math=False)
    draw(figure.subplots(), grown, counted[1])
    write_file(args.out / "growth.png", lambda file: figure.savefig(file, dpi=150))
    print(f"wrote one-block.pt and growth.png to {args.out.resolve()}", file=sys.stderr)
    print("\n60 characters from each (↵ is a new line):\n")
    start = torch.zeros(1, 1, dtype=torch.long)  # the first character of the vocabulary
    for rung in grown:
        generator = torch.Generator().manual_seed(args.seed)
        sampled = decode(generate(rung.model, start, 500, generator), vocab)
        print(f"{rung.title:14}", sampled[:60].replace("\n", "↵"))
    print(f"\n500 characters from the last model:\n\n{sampled}")


def draw(axes, grown, counted):
    """Plot the validation losses. A label gives the loss of the weights that a model keeps."""
    bigram, *others = [[loss for _, loss in rung.curve] for rung in grown]
    visible = [counted, bigram[-1]] + sum(others, [])  # the bigram's first losses are far higher
    span = max(max(visible) - min(visible), 0.1)
    gap = 0.05 * span
    top = max(visible) + gap
    steps = [step for step, _ in grown[0].curve]
    labels = [(counted, f"{counted:.3f}  0 counting", "black")]
    axes.axhline(counted, linestyle=":", color="black")
    # The colours of Okabe and Ito: colour-blind readers can tell them apart.
    colors = cycle(["#E69F00", "#56B4E9", "#D55E00", "#009E73", "#0072B2", "#CC79A7"])
    for rung, color in zip(grown, colors):
        losses = [loss for _, loss in rung.curve]
        axes.semilogx(steps, losses, "o-", color=color, subs=[])  # no minor ticks
        labels.append((losses[-1], f"{rung.training['val_loss']:.3f}  {rung.title}", color))
        for step, loss in rung.curve:
            if loss > top:
                axes.text(step, top, f"↑ {loss:.2f}", color=color, ha="center", va="bottom")
    height = -math.inf
    for end, label, color in sorted(labels):
        height = max(end, height + gap)  # labels must not cover each other
        axes.text(1.12 * steps[-1], height, label, color=color, va="center")
    axes.set(xlim=(0.9 * steps[0], 1.1 * steps[-1]), ylim=(top - 1.1 * span, top))
    axes.set(xticks=steps, xticklabels=steps, xlabel="iteration", ylabel="nats per character")


def sample(args):
    """Continue a prompt: print one text while it is drawn, or several, drawn as one batch."""
    if args.temperature != 0 and not 0.01 <= args.temperature <= 100:  # refuses nan, too
        raise UserError("--temperature must be 0, or from 0.01 to 100")
    model, vocab, _ = load(args.weights, args.input)
    prompt = args.prompt
    if prompt == "-":
        sys.stdin.reconfigure(encoding="utf-8-sig", newline=None)  # with any line ends
        prompt = sys.stdin.read()
    seed = torch.seed() % 2**32 if args.seed is None else args.seed
    generator = torch.Generator().manual_seed(seed)
    idx = encode(prompt or vocab[0], vocab).repeat(args.samples, 1)  # (B, T), T at least 1
    began = time.perf_counter()
    drawn = generate_cached(model, idx, args.tokens, args.temperature, args.top_k, generator)
    if args.samples == 1:
        print(prompt, end="", flush=True)
        for ids in drawn:  # (1,)
            print(vocab[ids[0]], end="", flush=True)
    else:
        texts = [prompt + decode(ids, vocab) for ids in torch.stack(list(drawn), dim=1)]
        print(f"\n{'-' * 40}\n".join(texts), end="", flush=True)
    speed = args.samples * args.tokens / (time.perf_counter() - began)
    print(f"\n{speed:,.0f} characters per second, seed {seed}", file=sys.stderr)


def evaluate(args):
    """Print a checkpoint's exact losses on both parts of a text, next to those in its file."""
    model, vocab, training = load(args.weights, args.input)
    ids = encode(read_text(args.input), vocab, args.input)
    train_ids, val_ids = split(ids, model.config.block_size, args.input)  # (N,) each
    print(f"{'loss on ' + args.input.name:24} measured  in the file  bits/char")
    for part, ids in (("train", train_ids), ("val", val_ids)):
        loss = exact_loss(model, ids, part)
        key = f"{part}_loss"
        stored = f"{training[key]:.4f}" if key in training else "nothing"
        print(f"{part:24}{loss:9.4f}{stored:>13}{loss / math.log(2):11.4f}")


# ------------------------------------------------------------------------------------ command line
class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help, and grow, sample or evaluate --help)")


def within(low, high=2**32):  # a type for add_argument
    def whole_number(text):  # argparse shows this name
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high:,}, not {text}")
        return value

    return whole_number


def parse(argv):
    """The action and the options of a command line. Without an action, it is grow."""
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["grow", *argv]
    parser = Parser(description="From bigram to GPT. Each action has its own --help.")
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    grower = actions.add_parser("grow", help=grow.__doc__)
    sampler = actions.add_parser("sample", help=sample.__doc__)
    evaluator = actions.add_parser("evaluate", help=evaluate.__doc__)
    for action in (grower, sampler, evaluator):
        action.add_argument("--input", type=Path, default=TEXT, help="a text (Tiny Shakespeare)")
    for action in (sampler, evaluator):
        action.add_argument(
            "--weights", type=Path, default=WEIGHTS, help="a checkpoint (gpt_shakespeare.pt)"
        )
    grower.add_argument("--steps", type=within(1), default=STEPS, help="iterations (%(default)s)")
    grower.add_argument("--seed", type=within(0), default=SEED, help="random seed (%(default)s)")
    grower.add_argument("--out", type=Path, default=Path(), help="folder for the files (current)")
    sampler.add_argument("--prompt", default="", help="what to continue; - reads it from stdin")
    sampler.add_argument("--tokens", type=within(1), default=500, help="how many characters (500)")
    sampler.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest (0.8)")
    sampler.add_argument(
        "--top-k", "--top_k", type=within(0), default=0, help="the TOP_K likeliest only (0: all)"
    )
    sampler.add_argument("--samples", type=within(1, 256), default=1, help="how many texts (1)")
    sampler.add_argument("--seed", type=within(0), help="the same seed gives the same text")
    return parser.parse_args(argv)


def main(argv):
    """Run an action and return the exit status: 2 if the user has something to correct."""
    closed_pipe = (errno.EPIPE, errno.EINVAL)  # EINVAL on Windows: cpython's issue 79935
    try:
        args = parse(argv)
        {"grow": grow, "sample": sample, "evaluate": evaluate}[args.action](args)
        return 0
    except (UserError, OSError, UnicodeError, ImportError, AssertionError) as error:
        if isinstance(error, OSError) and error.errno in closed_pipe and not error.filename:
            return 141  # as by `| head`: 128 + 13 is the status of a program that SIGPIPE ends
        print("error:", *str(error).splitlines(), file=sys.stderr)
        return 2


if __name__ == "__main__":
    if hasattr(sys, "ps1") or not hasattr(sys.stdout, "reconfigure"):  # IPython, Jupyter or IDLE
        main(sys.argv[1:])  # goes on afterwards
    else:
        if not sys.stdout.isatty():
            sys.stdout.reconfigure(encoding="utf-8", newline="\n")
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the program at once
        # os._exit, since after a closed pipe Python would wait for the threads that still train.
        tqdm.set_lock(threading.RLock())  # without this, os._exit gets a warning on a Mac
        os._exit(main(sys.argv[1:]))
