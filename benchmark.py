"""How fast this project is next to the textbook way: `python benchmark.py` prints one table.

The textbook way is that of the lecture's gpt.py, spelled out below, in float32: a module for each
head, batches stacked from slices, losses of random batches, AdamW. It computes the whole window
again for each character that it samples (but in eval mode and without gradients). All rows take
four minutes on two cores. There the table was:

Medians of 3 rounds. Intel(R) Xeon(R) Processor, 2 threads; Linux, Python 3.11.7, torch 2.13.0+cpu

work                                                                     textbook    ours  ratio
train the one-block GPT: 3,000 iterations and evaluations                  16.7 s  9.89 s   1.69
sample 1 × 500 characters from the large model                             18.1 s  1.08 s   16.7
sample 64 × 64 characters from the large model                             16.1 s  1.06 s   15.3
train the large model: 1 × 32 × 256, cpu, 2 cores; ours: bfloat16, Muon    5.22 s  1.94 s    2.7

The last row's sizes are iterations × sequences × characters. On an NVIDIA H200 (torch 2.11),
20 × 64 × 256 took 1.08 s and 0.13 s, a ratio of 8.25. On two cores of an AMD EPYC, which does not
compute in bfloat16, the ratios were 1.98, 10.1, 16.5 and (ours in float32) 1.28.
"""

import json
import platform
import re
import sys
import time
from argparse import ArgumentParser
from contextlib import redirect_stdout
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import ModuleType

gpt = import_module("bigram-to-gpt")
torch, nn, F = gpt.torch, gpt.nn, gpt.F  # the script sets GOMP_SPINCOUNT before it imports torch
NOTEBOOK = gpt.WEIGHTS.with_name("model.ipynb")

# ------------------------------------------------------------------------------------- the textbook


class Head(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, head_size = config.n_embd, config.n_embd // config.n_head
        self.key, self.query, self.value = (nn.Linear(C, head_size, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.ones(config.block_size, config.block_size).tril())
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):  # (B, T, C)
        T = x.shape[1]
        k, q, v = self.key(x), self.query(x), self.value(x)  # (B, T, head_size) each
        scores = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5  # (B, T, T)
        scores = scores.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        return self.dropout(scores.softmax(dim=-1)) @ v  # (B, T, head_size)


class MultiHeadAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = nn.ModuleList(Head(config) for _ in range(config.n_head))
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):  # (B, T, C)
        return self.dropout(self.proj(torch.cat([head(x) for head in self.heads], dim=-1)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        layers = nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C), nn.Dropout(config.dropout)
        self.sa, self.ffwd = MultiHeadAttention(config), nn.Sequential(*layers)
        self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)

    def forward(self, x):  # (B, T, C)
        x = x + self.sa(self.ln1(x))
        return x + self.ffwd(self.ln2(x))


class TextbookGPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.block_size = config.block_size
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding_table = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.Sequential(*[Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)

    def forward(self, idx):  # (B, T)
        positions = torch.arange(idx.shape[1], device=idx.device)  # (T,)
        x = self.token_embedding_table(idx) + self.position_embedding_table(positions)  # (B, T, C)
        return self.lm_head(self.ln_f(self.blocks(x)))  # (B, T, V)


def random_batch_loss(model, data, batch_size):
    starts = torch.randint(len(data) - model.block_size, (batch_size,))
    x = torch.stack([data[i : i + model.block_size] for i in starts])  # (B, T)
    y = torch.stack([data[i + 1 : i + model.block_size + 1] for i in starts])  # (B, T)
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def textbook_step(model, optimizer, data, batch_size):
    loss = random_batch_loss(model, data, batch_size)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def textbook_training(config, splits, steps, eval_iters):
    model = TextbookGPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        if step % 500 == 0 or step == steps - 1:
            with torch.no_grad():
                losses = [[random_batch_loss(model, data, 32) for _ in range(eval_iters)]
                          for data in splits]  # fmt: skip
        textbook_step(model, optimizer, splits[0], 32)
    return torch.tensor(losses).mean(dim=1)  # (2,)


@torch.no_grad()
def textbook_generate(model, idx, max_new_tokens):
    model.eval()
    for _ in range(max_new_tokens):
        logits = model(idx[:, -model.block_size :])[:, -1]  # (B, V)
        idx = torch.cat((idx, torch.multinomial(logits.softmax(dim=-1), 1)), dim=1)  # (B, T + 1)
    return idx


# ------------------------------------------ the rows: a title, then what to time, textbook and ours


def growth(steps=3000, eval_iters=200):
    text = gpt.read_text(gpt.TEXT)
    vocab = gpt.vocabulary(text)
    config = gpt.Config(len(vocab))
    splits = gpt.split(gpt.encode(text, vocab), config.block_size)
    theirs = partial(textbook_training, config, splits, steps, eval_iters)
    model = gpt.initialize(gpt.gpt, config, seed=1)
    title = f"train the one-block GPT: {steps:,} iterations and evaluations"
    return title, theirs, partial(gpt.train, model, *splits, steps, seed=1)


def sampling(texts, characters):
    model, _, _ = gpt.load(gpt.WEIGHTS)
    textbook, start = TextbookGPT(model.config), torch.zeros(texts, 1, dtype=torch.long)
    theirs = partial(textbook_generate, textbook, start, characters)
    title = f"sample {texts} × {characters} characters from the large model"
    return title, theirs, lambda: list(gpt.generate_cached(model, start, characters))


def iteration(**settings):
    """Ours is the notebook's own code: its cells run to the end of training, on a short text.
    On a CPU they leave out the dropout of attention weights, which the textbook has."""
    sys.modules["cells"] = ModuleType("cells")  # torch.compile looks for the module of a function
    names, tags = vars(sys.modules["cells"]), []
    with TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        Path(folder, "text").write_text(gpt.read_text(gpt.TEXT)[:20_000], encoding="utf-8")
        settings |= {"text_path": f"{folder}/text", "weights_path": f"{folder}/weights"}
        settings |= {"checkpoint_dir": folder, "iterations": 1}
        for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code" and "training" not in tags:
                exec("".join(cell["source"]), names)
                tags = cell["metadata"].get("tags", [])
                names.update(settings if "parameters" in tags else {})
    model = TextbookGPT(names["config"]).to(names["device"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    theirs = partial(textbook_step, model, optimizer, names["train_ids"], names["batch_size"])
    count = 20 if names["on_cuda"] else 1

    def repeat(step):
        for _ in range(count):
            loss = step()
        loss.item()  # waits for a GPU

    sizes = f"{count} × {names['batch_size']} × {names['block_size']}, {names['hardware']}"
    title = f"train the large model: {sizes}; ours: {names['precision']}, Muon"
    return title, partial(repeat, theirs), partial(repeat, names["next_iteration"])


ROWS = {"growth": growth, "text": partial(sampling, 1, 500), "texts": partial(sampling, 64, 64),
        "iteration": iteration}  # fmt: skip
ROW = "{:72} {:>8} {:>7} {:>6}"


def measure(row, rounds=3):
    title, *works = row()
    times = [], []
    for work, seconds in rounds * list(zip(works, times)):  # in turn: other load slows both
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    theirs, ours = map(median, times)
    return ROW.format(title, f"{theirs:.3g} s", f"{ours:.3g} s", f"{theirs / ours:.3g}")


def main(argv):
    parser = ArgumentParser(description="Our speed next to the textbook's, as one table.")
    parser.add_argument("--only", choices=ROWS, help="measure one row")
    only = parser.parse_args(argv).only
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    [cpu, *_] = re.findall("model name\\s*: (.*)", info) or [platform.machine()]
    versions = f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"
    print(f"Medians of 3 rounds. {cpu}, {torch.get_num_threads()} threads; {versions}\n")
    print(ROW.format("work", "textbook", "ours", "ratio"), flush=True)
    try:
        for name in [only] if only else ROWS:
            print(measure(ROWS[name]), flush=True)
    except (gpt.UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # into a file on Windows, too
    sys.exit(main(sys.argv[1:]))
