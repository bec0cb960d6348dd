"""How fast this project is beside the textbook way: `python benchmark.py` prints one table.

The textbook way is the lecture's, spelled out below: a module for each head, a table for the mask,
batches stacked from slices, losses estimated on 200 random batches, and for each new character the
whole window once more (in eval mode and without gradients, as ours). Both do the same work in turn,
a few times. The limit is the time that this machine would need if it did nothing but read the
weights from memory, or multiply and add, at the rates measured here. It takes about eight minutes.
"""

import io
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from runpy import run_path
from tempfile import TemporaryDirectory
from types import ModuleType

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
SCRIPT, NOTEBOOK = HERE / "bigram-to-gpt.py", HERE / "model.ipynb"

# ---------------------------------------------------------------------------------- the textbook


class Head(nn.Module):
    """One head of causal self-attention."""

    def __init__(self, config):
        super().__init__()
        head_size = config.n_embd // config.n_head
        self.key = nn.Linear(config.n_embd, head_size, bias=False)
        self.query = nn.Linear(config.n_embd, head_size, bias=False)
        self.value = nn.Linear(config.n_embd, head_size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(config.block_size, config.block_size)))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):  # (B, T, C)
        T = x.shape[1]
        k, q, v = self.key(x), self.query(x), self.value(x)  # (B, T, head_size) each
        scores = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5  # (B, T, T)
        scores = scores.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        return self.dropout(F.softmax(scores, dim=-1)) @ v  # (B, T, head_size)


class Block(nn.Module):
    """Several heads side by side, then a feed-forward network."""

    def __init__(self, config):
        super().__init__()
        width = config.n_embd
        self.heads = nn.ModuleList(Head(config) for _ in range(config.n_head))
        self.proj, self.dropout = nn.Linear(width, width), nn.Dropout(config.dropout)
        self.net = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.ReLU(),
            nn.Linear(4 * width, width),
            nn.Dropout(config.dropout),
        )
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x):  # (B, T, C)
        normed = self.ln1(x)
        heads = torch.cat([head(normed) for head in self.heads], dim=-1)  # (B, T, C)
        x = x + self.dropout(self.proj(heads))
        return x + self.net(self.ln2(x))


class TextbookGPT(nn.Module):
    """The same model as `gpt(config)` in the script, as the lecture writes it."""

    def __init__(self, config):
        super().__init__()
        self.block_size = config.block_size
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.Sequential(*[Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)

    def forward(self, idx, targets=None):  # (B, T) both
        positions = torch.arange(idx.shape[1], device=idx.device)  # (T,)
        x = self.token_embedding(idx) + self.position_embedding(positions)  # (B, T, C)
        logits = self.lm_head(self.ln_f(self.blocks(x)))  # (B, T, V)
        if targets is None:
            return logits, None
        B, T, V = logits.shape
        return logits, F.cross_entropy(logits.view(B * T, V), targets.reshape(B * T))


def textbook_batch(data, block_size, batch_size, device="cpu"):
    starts = torch.randint(len(data) - block_size, (batch_size,))
    x = torch.stack([data[i : i + block_size] for i in starts])  # (B, T)
    y = torch.stack([data[i + 1 : i + block_size + 1] for i in starts])  # (B, T)
    return x.to(device), y.to(device)


@torch.no_grad()
def textbook_estimate(model, splits, batch_size, eval_iters):
    """The mean loss over random batches of each split."""
    model.eval()
    for data in splits:
        losses = torch.zeros(eval_iters)
        for k in range(eval_iters):
            losses[k] = model(*textbook_batch(data, model.block_size, batch_size))[1].item()
        yield losses.mean()
    model.train()


def textbook_step(model, optimizer, data, batch_size, device="cpu"):
    _, loss = model(*textbook_batch(data, model.block_size, batch_size, device))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss


def textbook_growth(config, data, val_data, steps, eval_iters, batch_size=32):
    """Train the last rung, with both losses estimated every 500 iterations and at the end."""
    model = TextbookGPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        if step % 500 == 0 or step == steps - 1:
            losses = list(textbook_estimate(model, (data, val_data), batch_size, eval_iters))
        textbook_step(model, optimizer, data, batch_size)
    return losses


@torch.no_grad()
def textbook_generate(model, idx, count, choose=partial(torch.multinomial, num_samples=1)):
    """Continue `idx`, (B, T), by `count` characters."""
    model.eval()
    for _ in range(count):
        logits, _ = model(idx[:, -model.block_size :])  # (B, T, V)
        probabilities = F.softmax(logits[:, -1], dim=-1)  # (B, V)
        idx = torch.cat((idx, choose(probabilities)), dim=1)  # (B, T + 1)
    return idx


@torch.no_grad()
def textbook_loss(model, data, batch_size=64):
    """The mean loss over every character of `data`, (N,), in windows that do not overlap."""
    model.eval()
    total, block_size = 0.0, model.block_size
    x, y = data[:-1], data[1:]
    whole = len(x) // block_size * block_size
    batches = [(x[whole:].view(1, -1), y[whole:].view(1, -1))] if whole < len(x) else []
    windows = x[:whole].view(-1, block_size), y[:whole].view(-1, block_size)
    batches += zip(*(part.split(batch_size) for part in windows))
    for x, y in batches:  # (B, T) each
        total += model(x, y)[1].item() * y.numel()
    return total / (len(data) - 1)


def as_textbook(model):
    """A TextbookGPT with the weights of the script's model, which has all heads in one matrix."""
    textbook, weights = TextbookGPT(model.config), {}
    for name, tensor in model.state_dict().items():
        layer, _, part = name.rpartition(".")
        if name.endswith("attention.qkv.weight"):
            block = name.removesuffix("attention.qkv.weight")
            heads = tensor.view(3, model.config.n_head, -1, model.config.n_embd)
            for kind, matrices in zip(("query", "key", "value"), heads):
                for i, matrix in enumerate(matrices):  # (head_size, C)
                    weights[f"{block}heads.{i}.{kind}.weight"] = matrix
        else:
            for ours, theirs in (("attention.", ""), ("feed_forward.up", "net.0"),
                                 ("feed_forward.down", "net.2")):  # fmt: skip
                layer = layer.replace(ours, theirs)
            weights[f"{layer}.{part}"] = tensor
    weights |= {name: mask for name, mask in textbook.named_buffers()}
    textbook.load_state_dict(weights)
    return textbook.eval()


# ------------------------------------------------------------------------- the limits of a machine


def timed(work):
    """The seconds that a function takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@cache
def memory_rate():
    """Bytes per second that can be read from a block far larger than any cache."""
    block = torch.ones(1 << 27)
    return block.nbytes / min(timed(block.sum) for _ in range(10))


@cache
def matrix_rate(dtype=torch.float32, device="cpu"):
    """Multiplications and additions per second in products of large square matrices."""

    def work():
        product = a @ a
        if product.is_cuda:
            torch.cuda.synchronize()

    a = torch.randn(2048, 2048, device=device).to(dtype)
    return 2 * 2048**3 / min(timed(work) for _ in range(10))


def linear_weights(model):
    """All weights that a character is multiplied with; attention itself has none."""
    return [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]


def multiply_adds(model):
    """Multiplications and additions for one character on its way through the linear layers."""
    return sum(2 * weight.numel() for weight in linear_weights(model))


# ------------------------------------------------------------------------------ rows of the table


@dataclass
class Row:
    title: str
    textbook: Callable
    ours: Callable
    limit: float | None = None  # seconds
    factor: float = 1  # the textbook does 1 / factor of the work


def growth_rows(gpt, args):
    """The last rung by itself; all five with their table, picture and sample."""
    steps, eval_iters = (20, 2) if args.quick else (3000, 200)
    text = gpt.read_text(args.input)
    vocab = "".join(sorted(set(text)))
    config = gpt.Config(len(vocab))
    data, val_data = (gpt.encode(part, vocab) for part in gpt.split(text, config.block_size))

    def textbook():
        textbook_growth(config, data, val_data, steps, eval_iters)

    def last_rung():
        model = gpt.initialize(gpt.gpt(config), seed=1)
        gpt.train(model, data, val_data, config.block_size, steps, seed=1)
        gpt.exact_loss(model, data, config.block_size)

    def all_rungs():
        threads, output = torch.get_num_threads(), io.StringIO()
        with redirect_stdout(output), redirect_stderr(output), TemporaryDirectory() as folder:
            gpt.grow(Namespace(input=args.input, steps=steps, seed=1, out=Path(folder)))
        torch.set_num_threads(threads)  # it takes one for each model

    passes = 3 * steps * 32 * config.block_size + 5 * len(val_data) + len(data)
    work = [passes * multiply_adds(build(config)) for _, _, build in gpt.RUNGS]
    limit, title = work[-1] / matrix_rate(), f"last rung: {steps} iterations and its evaluations"
    yield Row(title, textbook, last_rung, limit)
    limit, title = sum(work) / matrix_rate(), "all five rungs, beside the textbook's last"
    yield Row(title, textbook, all_rungs, limit)


def sampling_rows(gpt, args):
    """One text with the weights as they are stored; several as one batch, in float32."""
    tokens, samples, few = (12, 2, 1) if args.quick else (500, 64, 3)
    (stored, *_), (model, *_) = gpt.load(args.weights), gpt.load(args.weights)
    model.float()
    textbook, start = as_textbook(model), torch.zeros(1, 1, dtype=torch.long)
    limit = tokens * sum(weight.nbytes for weight in linear_weights(stored)) / memory_rate()
    yield Row(
        f"sampling {tokens} characters",
        lambda: textbook_generate(textbook, start, tokens),
        lambda: list(gpt.generate(stored, start, tokens)),
        limit,
    )
    # The textbook would take a quarter of an hour. It draws a few characters, from windows as long
    # as they are on average when all are drawn.
    windows = [min(length, model.config.block_size) for length in range(1, tokens + 1)]
    prompt = torch.zeros(samples, sum(windows) // tokens, dtype=torch.long)
    yield Row(
        f"sampling {samples} times {tokens} characters at once; textbook: {few}, scaled",
        lambda: textbook_generate(textbook, prompt, few),
        lambda: list(gpt.generate(model, start.repeat(samples, 1), tokens)),
        samples * tokens * multiply_adds(model) / matrix_rate(),
        tokens / few,
    )


def start_row(gpt, args):
    """Two processes."""
    reading = ["-c", f"import torch; open({str(args.weights)!r}, 'rb').read()"]
    sample = [SCRIPT, "sample", "--tokens", "1", "--weights", args.weights]

    def process(arguments):
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    title = "`sample --tokens 1`, beside importing torch and reading the weights"
    return Row(title, partial(process, reading), partial(process, sample))


def run_notebook(**settings):
    """The names that the notebook's cells define up to its training loop, with other settings."""
    sys.modules["notebook"] = module = ModuleType("notebook")  # @dataclass looks there
    names = vars(module)
    with redirect_stdout(io.StringIO()):
        for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code" and "train" not in names:
                exec("".join(cell["source"]), names)
                if "parameters" in cell["metadata"].get("tags", []):
                    names.update(settings)
    return module


def iteration_row(gpt, args):
    """The large model on whatever device there is, by the notebook's own cells."""
    settings = {"batch_size": 2} if args.quick else {}
    notebook = run_notebook(text_path=str(args.input), prompt="", **settings)
    run, model = notebook.Run(), TextbookGPT(notebook.config).to(notebook.device).train()
    for module in model.modules():
        if isinstance(module, Head):
            module.dropout.p = notebook.attention_dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    data = notebook.train_ids.cpu()

    def textbook():
        textbook_step(model, optimizer, data, notebook.batch_size, notebook.device)
        notebook.now()  # waits for a GPU

    def ours():
        notebook.advance(run)
        notebook.now()

    textbook(), ours()  # the first one takes longer
    characters = notebook.batch_size * notebook.block_size
    title = f"one training iteration of the large model, {characters:,} characters, "
    title += f"{notebook.device.type}; ours in {notebook.precision}"
    rate = matrix_rate(notebook.dtype, notebook.device)
    return Row(title, textbook, ours, 3 * characters * multiply_adds(run.model) / rate)


def loss_row(gpt, args):
    model, vocab, _ = gpt.load(args.weights)
    block_size = model.config.block_size
    ids = gpt.encode(gpt.split(gpt.read_text(args.input), block_size)[1], vocab)
    textbook = as_textbook(model)
    return Row(
        f"loss of the large model on the validation split, {len(ids):,} characters",
        lambda: textbook_loss(textbook, ids),
        lambda: gpt.exact_loss(model, ids, block_size),
        len(ids) * multiply_adds(model) / matrix_rate(),
    )


# -------------------------------------------------------------------------------------- the table


def profile(gpt, steps):
    """Where one iteration of the last rung spends its time, in a sentence."""
    model, ids = gpt.initialize(gpt.gpt(gpt.Config(65)), seed=1), torch.randint(65, (10_000,))
    work = partial(gpt.train, model, ids, ids[:9], model.config.block_size, steps, seed=1)
    milliseconds = 1000 * timed(work) / steps
    with torch.profiler.profile() as profiled:
        work()
    spent = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    products = sum(spent[name] for name in ("aten::mm", "aten::addmm", "aten::bmm"))
    share = products / sum(spent.values())
    work = 3 * 32 * model.config.block_size * multiply_adds(model)
    yield f"One iteration of the last rung takes {milliseconds:.2f} ms"
    yield f"its {work / 1e6:.0f} MFLOP need {1000 * work / matrix_rate():.2f} ms at that rate"
    yield f"torch.profiler sees {share:.0%} of the time in matrix products, the rest in small work"


def hardware():
    cpuinfo = Path("/proc/cpuinfo")
    named = cpuinfo.exists() and re.search("model name\\s*: (.*)", cpuinfo.read_text())
    yield named[1] if named else platform.processor() or platform.machine()
    yield f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        yield torch.cuda.get_device_name()
    yield f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"
    yield f"reads {memory_rate() / 1e9:.0f} GB/s, multiplies {matrix_rate() / 1e9:.0f} GFLOP/s"


def line(row, times):
    """A row as Markdown, from the seconds that each function took in each round."""

    def spread(values, unit):
        return f"{statistics.median(values):.2f}{unit} ({min(values):.2f}-{max(values):.2f})"

    ours, textbook = times[row.ours], [row.factor * seconds for seconds in times[row.textbook]]
    ratios = [theirs / mine for theirs, mine in zip(textbook, ours)]
    limit = "none" if row.limit is None else f"{row.limit:.2f} s"
    cells = row.title, spread(textbook, " s"), spread(ours, " s"), spread(ratios, ""), limit
    return f"| {' | '.join(cells)} |"


def main(argv):
    gpt = Namespace(**run_path(str(SCRIPT)))
    parser = ArgumentParser(description="Our speed beside the textbook's, as one table.")
    parser.add_argument("--weights", type=Path, default=gpt.WEIGHTS, help="the large checkpoint")
    parser.add_argument("--input", type=Path, default=gpt.TEXT, help="the text")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is timed (3)")
    parser.add_argument("--quick", action="store_true", help="little work, to see that all runs")
    args = parser.parse_args(argv)
    rows = [*growth_rows(gpt, args), *sampling_rows(gpt, args)]
    rows += [row(gpt, args) for row in (start_row, iteration_row, loss_row)]
    works = dict.fromkeys(work for row in rows for work in (row.textbook, row.ours))
    times = {work: [] for work in works}
    for work in tqdm([*works] * args.rounds):
        times[work].append(timed(work))

    print("; ".join(hardware()))
    print(f"Medians of {args.rounds} rounds (smallest-largest).\n")
    print("| work | textbook | ours | textbook / ours | limit |\n|---|--:|--:|--:|--:|")
    for row in rows:
        print(line(row, times))
    print(f"\n{'; '.join(profile(gpt, steps=20 if args.quick else 100))}.")


if __name__ == "__main__":
    main(sys.argv[1:])
