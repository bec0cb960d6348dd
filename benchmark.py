"""How fast this project is beside the textbook way: `python benchmark.py` prints one table.

The textbook way is that of the lecture's gpt.py, spelled out below: a module for each head, a table
for the mask, batches stacked from slices, losses estimated on 200 random batches every 500
iterations, and for each new character the whole window once more (in eval mode and without
gradients, as ours). Textbook and ours take turns, a few times; the table has the medians.

The limit is the time that a machine would need if it did nothing but read the weights of the linear
layers from memory, or multiply and add in them, at the rates measured here (caches that hold all
weights can beat the first). It takes about seven minutes on two cores.
"""

import io
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
from functools import partial
from pathlib import Path
from runpy import run_path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "bigram-to-gpt.py"

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


class MultiHeadAttention(nn.Module):
    """Several heads side by side."""

    def __init__(self, config):
        super().__init__()
        self.heads = nn.ModuleList(Head(config) for _ in range(config.n_head))
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):  # (B, T, C)
        return self.dropout(self.proj(torch.cat([head(x) for head in self.heads], dim=-1)))


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):  # (B, T, C)
        return self.dropout(self.down(F.relu(self.up(x))))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln1, self.attention = nn.LayerNorm(config.n_embd), MultiHeadAttention(config)
        self.ln2, self.feed_forward = nn.LayerNorm(config.n_embd), FeedForward(config)

    def forward(self, x):  # (B, T, C)
        x = x + self.attention(self.ln1(x))
        return x + self.feed_forward(self.ln2(x))


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
        positions = torch.arange(idx.shape[1])  # (T,)
        x = self.token_embedding(idx) + self.position_embedding(positions)  # (B, T, C)
        logits = self.lm_head(self.ln_f(self.blocks(x)))  # (B, T, V)
        if targets is None:
            return logits, None
        B, T, V = logits.shape
        return logits, F.cross_entropy(logits.view(B * T, V), targets.view(B * T))


def textbook_batch(data, block_size, batch_size):
    starts = torch.randint(len(data) - block_size, (batch_size,))
    x = torch.stack([data[i : i + block_size] for i in starts])  # (B, T)
    y = torch.stack([data[i + 1 : i + block_size + 1] for i in starts])  # (B, T)
    return x, y


@torch.no_grad()
def textbook_estimate(model, splits, batch_size, eval_iters):
    """The mean loss over random batches of each split."""
    means = []
    model.eval()
    for data in splits:
        losses = torch.zeros(eval_iters)
        for k in range(eval_iters):
            losses[k] = model(*textbook_batch(data, model.block_size, batch_size))[1].item()
        means.append(losses.mean().item())
    model.train()
    return means


def textbook_step(model, optimizer, data, batch_size):
    _, loss = model(*textbook_batch(data, model.block_size, batch_size))
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
            losses = textbook_estimate(model, (data, val_data), batch_size, eval_iters)
        textbook_step(model, optimizer, data, batch_size)
    return losses


@torch.no_grad()
def textbook_generate(model, idx, count):
    """Continue `idx`, (B, T), by `count` characters."""
    model.eval()
    for _ in range(count):
        logits, _ = model(idx[:, -model.block_size :])  # (B, T, V)
        probabilities = F.softmax(logits[:, -1], dim=-1)  # (B, V)
        drawn = torch.multinomial(probabilities, num_samples=1)  # (B, 1)
        idx = torch.cat((idx, drawn), dim=1)  # (B, T + 1)
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
    config, weights = model.config, model.state_dict()
    for i in range(config.n_layer):
        qkv = weights.pop(f"blocks.{i}.attention.qkv.weight")  # (3 * C, C)
        heads = qkv.view(3, config.n_head, -1, config.n_embd)  # (3, n_head, head_size, C)
        for kind, matrices in zip(("query", "key", "value"), heads):
            for j, matrix in enumerate(matrices):  # (head_size, C)
                weights[f"blocks.{i}.attention.heads.{j}.{kind}.weight"] = matrix
    textbook = TextbookGPT(config)
    textbook.load_state_dict(weights | dict(textbook.named_buffers()))
    return textbook.eval()


# ------------------------------------------------------------------------- the limits of a machine


def timed(work):
    """The seconds that a function takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def memory_rate():
    """Bytes per second that can be read from a block far larger than most caches."""
    block = torch.ones(1 << 27)
    return block.nbytes / min(timed(block.sum) for _ in range(10))


def matrix_rate():
    """Multiplications and additions per second in products of large square matrices."""
    a = torch.randn(2048, 2048)
    return 2 * len(a) ** 3 / min(timed(partial(torch.mm, a, a)) for _ in range(5))


def linear_weights(model):
    """All weights that a character is multiplied with; attention itself has none."""
    return [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]


def multiply_adds(model):
    """Multiplications and additions for one character on its way through the linear layers."""
    return sum(2 * weight.numel() for weight in linear_weights(model))


# ------------------------------------------------------------------------------ rows of the table


@dataclass
class Row:
    """Two functions that do a piece of work, and the bytes or operations that bound it."""

    title: str
    textbook: Callable
    ours: Callable
    amount: float = 0
    rate: Callable | None = None  # measures how much of the amount is possible in a second
    factor: float = 1  # the textbook does 1 / factor of the work


def growth_rows(script, args):
    """The last rung by itself; all five with their table, picture and sample."""
    steps, eval_iters = (20, 2) if args.quick else (3000, 200)
    text = script.read_text(args.input)
    vocab = "".join(sorted(set(text)))
    config = script.Config(len(vocab))
    data, val_data = (script.encode(part, vocab) for part in script.split(text, config.block_size))

    def textbook():  # timed once a round, for both rows
        textbook_growth(config, data, val_data, steps, eval_iters)

    def last_rung():
        model = script.initialize(script.gpt, config, seed=1)
        script.train(model, data, val_data, config.block_size, steps, seed=1)

    def all_rungs():
        threads, output = torch.get_num_threads(), io.StringIO()
        with redirect_stdout(output), redirect_stderr(output), TemporaryDirectory() as folder:
            script.grow(Namespace(input=args.input, steps=steps, seed=1, out=Path(folder)))
        torch.set_num_threads(threads)  # it takes one for each model

    passes = 3 * steps * 32 * config.block_size + 4 * len(val_data) + len(data)
    flop = [passes * multiply_adds(build(config)) for _, _, build in script.RUNGS]
    title = f"growing the last rung: {steps} iterations and its evaluations"
    yield Row(title, textbook, last_rung, flop[-1], matrix_rate)
    yield Row(
        "growing all five, beside the last alone", textbook, all_rungs, sum(flop), matrix_rate
    )


def sampling_rows(script, args):
    """One text in the precision of the file; several as one batch in float32."""
    tokens, samples, few = (12, 2, 1) if args.quick else (500, 64, 3)
    stored, _, _ = script.load(args.weights)
    model, _, _ = script.load(args.weights)
    model.float()
    textbook, start = as_textbook(model), torch.zeros(1, 1, dtype=torch.long)
    precision = str(stored.lm_head.weight.dtype).removeprefix("torch.")
    yield Row(
        f"sampling {tokens} characters; ours in {precision}",
        lambda: textbook_generate(textbook, start, tokens),
        lambda: list(script.generate_cached(stored, start, tokens)),
        tokens * sum(weight.nbytes for weight in linear_weights(stored)),
        memory_rate,
    )
    # The textbook would take a quarter of an hour. It draws a few characters, from windows as long
    # as they are on average when all are drawn.
    windows = [min(length, model.config.block_size) for length in range(1, tokens + 1)]
    prompt = torch.zeros(samples, sum(windows) // tokens, dtype=torch.long)
    yield Row(
        f"sampling {samples} times {tokens} at once, float32; textbook: {few}, scaled",
        lambda: textbook_generate(textbook, prompt, few),
        lambda: list(script.generate_cached(model, start.repeat(samples, 1), tokens)),
        samples * tokens * multiply_adds(model),
        matrix_rate,
        tokens / few,
    )


def start_row(script, args):
    """Processes: what `sample` takes to its first character, beside what no use of torch avoids."""
    least = f"import os, torch; open({str(args.weights)!r}, 'rb').read(); os._exit(0)"
    sample = [SCRIPT, "sample", "--tokens", "1", "--weights", args.weights]

    def process(*arguments):
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    title = "`sample --tokens 1`, beside importing torch and reading the weights"
    return Row(title, partial(process, "-c", least), partial(process, *sample))


def loss_row(script, args):
    """The whole validation split; the textbook takes the lecture's batches of 64."""
    model, vocab, _ = script.load(args.weights)
    model, block_size = model.float(), model.config.block_size
    _, val_text = script.split(script.read_text(args.input), block_size)
    ids, textbook = script.encode(val_text, vocab), as_textbook(model)
    if args.quick:
        ids = ids[:1000]
    return Row(
        f"loss of {len(ids):,} characters",
        lambda: textbook_loss(textbook, ids),
        lambda: script.exact_loss(model, ids, block_size),
        len(ids) * multiply_adds(model),
        matrix_rate,
    )


# -------------------------------------------------------------------------------------- the table


def profile(script, rate, steps):
    """Where one iteration of the last rung spends its time, in a sentence."""
    model, ids = script.initialize(script.gpt, script.Config(65), 1), torch.randint(65, (1000,))
    work = partial(script.train, model, ids, ids[:9], model.config.block_size, steps, seed=1)
    milliseconds = 1000 * timed(work) / steps
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        work()
    spent = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    products = sum(spent[name] for name in ("aten::mm", "aten::addmm", "aten::bmm"))
    flop = 3 * 32 * model.config.block_size * multiply_adds(model)
    yield f"One iteration of the last rung: {milliseconds:.2f} ms"
    yield f"its {flop / 1e6:.0f} MFLOP would take {1000 * flop / rate:.2f} ms at the rate above"
    yield f"torch.profiler sees {products / sum(spent.values()):.0%} of the time in matrix products"


def hardware(rates):
    cpuinfo = Path("/proc/cpuinfo")
    named = cpuinfo.exists() and re.search("model name\\s*: (.*)", cpuinfo.read_text())
    yield named[1] if named else platform.processor() or platform.machine()
    yield f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads"
    yield f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"
    yield f"{rates[memory_rate] / 1e9:.0f} GB/s from memory"
    yield f"{rates[matrix_rate] / 1e9:.0f} GFLOP/s in float32"


def digits(value):
    """Three of them that count, or as many as there are."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def line(row, times, rates):
    """A row as Markdown, from the seconds that each function took in each round."""

    def spread(values, unit):
        low, middle, high = map(digits, (min(values), statistics.median(values), max(values)))
        return f"{middle}{unit} ({low}-{high})"

    ours, textbook = times[row.ours], [row.factor * seconds for seconds in times[row.textbook]]
    ratios = [theirs / mine for theirs, mine in zip(textbook, ours)]
    limit = f"{digits(row.amount / rates[row.rate])} s" if row.rate else "none"
    cells = row.title, spread(textbook, " s"), spread(ours, " s"), spread(ratios, ""), limit
    return f"| {' | '.join(cells)} |"


def measure(script, args):
    """Time all, in turn, and print the table."""
    rows = [*growth_rows(script, args), *sampling_rows(script, args)]
    rows += [row(script, args) for row in (start_row, loss_row)]
    times = {work: [] for row in rows for work in (row.textbook, row.ours)}
    rates = {row.rate: 0 for row in rows if row.rate}
    for work in tqdm([*rates, *times] * args.rounds):
        if work in rates:
            rates[work] = max(rates[work], work())
        else:
            times[work].append(timed(work))

    print("; ".join(hardware(rates)))
    print(f"Rounds: {args.rounds}; medians, and in brackets the smallest and the largest.\n")
    print("| work | textbook | ours | textbook / ours | limit |\n|---|--:|--:|--:|--:|")
    for row in rows:
        print(line(row, times, rates))
    print(f"\n{'; '.join(profile(script, rates[matrix_rate], steps=20 if args.quick else 100))}.")


def main(argv):
    script = Namespace(**run_path(str(SCRIPT)))
    parser = ArgumentParser(description="Our speed beside the textbook's, as one table.")
    parser.add_argument("--weights", type=Path, default=script.WEIGHTS, help="the large checkpoint")
    parser.add_argument("--input", type=Path, default=script.TEXT, help="the text")
    parser.add_argument("--rounds", type=int, default=3, help="how many (3)")
    parser.add_argument("--quick", action="store_true", help="little work, to see that all runs")
    try:
        measure(script, parser.parse_args(argv))
    except (script.UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
