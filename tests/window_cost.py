"""What sampling beyond the window costs: the cache is refilled with the last half of the window.

    python tests/window_cost.py --weights one-block.pt [--input FILE] [--characters N]

Prints the loss on the validation split, in nats per character, when each character is predicted
from a full window, and when it is predicted as `sample` does, from half a window to a full one.
"""

import argparse
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import torch
from torch.nn import functional as F


@torch.inference_mode()
def window_losses(model, data):
    """Two losses on the same characters of `data`: with a full window, with one as sampled."""
    block_size = model.config.block_size
    kept = max(1, block_size // 2)
    # A refilled cache predicts from `kept` characters, then from one more each time.
    refilled = data[1 + block_size - kept :].unfold(0, block_size + 1, 1 + block_size - kept)
    targets = refilled[:, kept:].flatten()
    full = data[1:].unfold(0, block_size + 1, 1)[: len(targets)]
    losses = []
    for windows, first in ((full, block_size), (refilled, kept)):
        parts = windows.split(max(1, 4096 // block_size))
        logits = torch.cat([model(part[:, :-1])[:, first - 1 :].flatten(0, 1) for part in parts])
        losses.append(F.cross_entropy(logits, targets).item())
    return losses


if __name__ == "__main__":
    gpt = SimpleNamespace(**run_path(Path(__file__).resolve().parent.parent / "bigram-to-gpt.py"))
    parser = argparse.ArgumentParser(description="What sampling beyond the window costs in loss.")
    parser.add_argument("--weights", type=Path, default=gpt.WEIGHTS)
    parser.add_argument("--input", type=Path, default=gpt.TEXT)
    parser.add_argument("--characters", type=int, help="look at the first N only")
    args = parser.parse_args()
    try:
        model, vocab, _ = gpt.load(args.weights, args.input)
        model.float()
        _, val = gpt.split(gpt.read_text(args.input), model.config.block_size)
        ids = gpt.encode(val[: args.characters], vocab)
    except (gpt.UserError, OSError) as error:
        parser.error(str(error))
    full, refilled = window_losses(model, ids)
    print(f"full window        {full:.4f}")
    print(f"window as sampled  {refilled:.4f}")
