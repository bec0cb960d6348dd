"""Weights from the lecture's own code: loaded with its logits, or refused by what does not fit."""

import math

import pytest
import torch
from conftest import SCRIPT, module_of
from torch import nn
from torch.nn import functional as F

benchmark = module_of(SCRIPT.with_name("benchmark.py"))
TEXT = "far away, over the hills\n" * 40


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        layers = nn.Linear(config.n_embd, 4 * config.n_embd), nn.ReLU()
        self.net = nn.Sequential(*layers, nn.Linear(4 * config.n_embd, config.n_embd), nn.Dropout())

    def forward(self, x):
        return self.net(x)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.sa, self.ffwd = benchmark.MultiHeadAttention(config), FeedForward(config)
        self.ln1, self.ln2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)

    def forward(self, x):
        x = x + self.sa(self.ln1(x))
        return x + self.ffwd(self.ln2(x))


class GPTLanguageModel(nn.Module):
    """The parts by the names that the lecture gives them; its heads are those of the benchmark."""

    def __init__(self, config):
        super().__init__()
        self.token_embedding_table = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding_table = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.n_layer)))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)

    def forward(self, idx):  # (B, T)
        positions = self.position_embedding_table(torch.arange(idx.shape[1]))
        return self.lm_head(self.ln_f(self.blocks(self.token_embedding_table(idx) + positions)))


@pytest.fixture
def text_path(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def theirs(gpt):
    """A model of the lecture whose every part matters, for the characters of TEXT."""
    torch.manual_seed(0)
    model = GPTLanguageModel(gpt.Config(len(set(TEXT)), 16, n_layer=2, n_head=4, n_embd=32))
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.1, 0.3)
    return model.eval()


WRAPPED = {
    "bare": lambda weights: weights,
    "in a dict": lambda weights: {"step": 7, "loss": torch.ones(1), "model_state_dict": weights},
    "compiled": lambda weights: {f"_orig_mod.{name}": value for name, value in weights.items()},
    "parallel": lambda weights: {f"module.{name}": value for name, value in weights.items()},
    "wrapped": lambda weights: {f"net.model.{name}": value for name, value in weights.items()},
    "bool masks": lambda weights: {k: v.bool() if "tril" in k else v for k, v in weights.items()},
    "losses": lambda weights: {"model": weights, "losses": {i: torch.ones(1) for i in range(999)}},
    "both": lambda weights: {f"module._orig_mod.{k}": value for k, value in weights.items()},
    "float16": lambda weights: {name: value.half() for name, value in weights.items()},
    "float64": lambda weights: {name: value.double() for name, value in weights.items()},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_the_logits_are_those_of_the_lecture(gpt, theirs, text_path, tmp_path, wrap):
    torch.save(wrap(theirs.state_dict()), tmp_path / "theirs.pt")
    ours, vocab, training = gpt.load(tmp_path / "theirs.pt", text_path)
    assert vocab == "".join(sorted(set(TEXT))) and training == {} and not ours.training
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    if wrap is WRAPPED["float16"]:
        theirs.half().float()
    idx = torch.randint(len(vocab), (3, 16))
    torch.testing.assert_close(ours(idx), theirs(idx), atol=1e-5, rtol=1e-5)


def test_sample_and_evaluate(gpt, theirs, text_path, tmp_path, capsys):
    path = tmp_path / "theirs.pt"
    torch.save(theirs.state_dict(), path)
    options = ["--weights", str(path), "--input", str(text_path)]
    assert gpt.main(["sample", *options, "--prompt", "far", "--tokens", "40"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("far") and len(text) == 43 and set(text) <= set(TEXT)
    assert gpt.main(["evaluate", *options]) == 0
    row = capsys.readouterr().out.splitlines()[2].split()
    ids = gpt.encode(gpt.split(TEXT, 16)[1], "".join(sorted(set(TEXT))))
    total = 0.0
    for start in range(0, len(ids) - 1, 16):
        y = ids[start + 1 : start + 17]
        logits = theirs(ids[None, start : start + len(y)])[0]
        total += F.cross_entropy(logits, y, reduction="sum").item()
    assert row == ["validation", f"{total / (len(ids) - 1):.4f}", "nothing"]


def in_terms_of_the_lecture(weights, n_head, queries_times=1.0):
    """Weights of ours under the names of the lecture, a module for each head."""
    named = {}
    for name, value in weights.items():
        if "qkv" in name:
            for kind, part in zip(("query", "key", "value"), value.float().chunk(3)):
                part = part * queries_times if kind == "query" else part
                for head, rows in enumerate(part.chunk(n_head)):
                    named[f"{name.split('.att')[0]}.sa.heads.{head}.{kind}.weight"] = rows.clone()
            continue
        name = name.replace("token_embedding", "token_embedding_table")
        name = name.replace("position_embedding", "position_embedding_table")
        name = name.replace("attention.", "sa.").replace("feed_forward.", "ffwd.net.")
        named[name.replace("net.up", "net.0").replace("net.down", "net.2")] = value
    return named


@pytest.mark.parametrize("first", [False, True])
def test_both_scales_of_scores_in_the_lecture(gpt, tmp_path, capsys, first):
    """Its first code divided by sqrt(n_embd): there queries are sqrt(n_head) times as large."""
    ours, vocab, _ = gpt.load(gpt.WEIGHTS)
    ours.float()
    scale = math.sqrt(ours.config.n_head) if first else 1.0
    weights = in_terms_of_the_lecture(ours.state_dict(), ours.config.n_head, scale)
    torch.save(weights, tmp_path / "theirs.pt")
    text = gpt.read_text(gpt.MORE)[:20_000] + vocab
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    model, same_vocab, _ = gpt.load(tmp_path / "theirs.pt", tmp_path / "text.txt")
    assert same_vocab == vocab and ("root of n_embd" in capsys.readouterr().err) == first
    idx = torch.randint(65, (1, 256))
    with torch.inference_mode():
        torch.testing.assert_close(model(idx), ours(idx), atol=1e-3, rtol=1e-4)


def others(weights):
    """State dicts that do not fit, each under what should be said of it."""
    yield "transformer.wte.weight", {"transformer.wte.weight": torch.ones(9, 4), "n": torch.ones(1)}
    yield "neither ours", {"step": 3}
    yield "not two tables", {"token_embedding_table.weight": torch.ones(65, 65)}  # its bigram
    table = {"token_embedding_table.weight": torch.ones(65)}
    yield "not two tables", weights | table
    lacking = {name: value for name, value in weights.items() if "heads.1.key" not in name}
    yield "blocks.0.sa.heads.1.key.weight is missing, or not 8 x 32", lacking
    fused = {name: value for name, value in weights.items() if "heads" not in name}
    yield "blocks.0.sa.heads.0.query.weight is missing", fused
    square = torch.ones(32, 32)
    yield (
        "heads.0.value.weight is missing, or not",
        weights | {"blocks.1.sa.heads.0.value.weight": square},
    )
    without_head = {name: value for name, value in weights.items() if "lm_head" not in name}
    yield 'Missing key(s) in state_dict: "lm_head.weight"', without_head
    yield (
        "size mismatch for blocks.0.feed_forward.up.weight",
        weights | {"blocks.0.ffwd.net.0.weight": square},
    )
    yield 'Unexpected key(s) in state_dict: "gate.weight"', weights | {"gate.weight": square}
    yield "not a tensor of floats", weights | {"ln_f.bias": torch.ones(32, dtype=torch.long)}
    huge = {"blocks.0.sa.heads.0.key.weight": torch.ones(1).expand(1 << 33)}
    yield "larger than the file", weights | huge
    yield "make no sense", weights | {"position_embedding_table.weight": torch.ones(0, 32)}


def test_other_architectures_are_refused_by_naming_what_does_not_fit(
    gpt, theirs, text_path, tmp_path, capsys
):
    path = tmp_path / "theirs.pt"
    options = ["sample", "--weights", str(path), "--input", str(text_path)]
    for message, weights in others(dict(theirs.state_dict())):
        torch.save(weights, path)
        assert gpt.main(options) == 2
        out, err = capsys.readouterr()
        assert message in err and err.count("\n") == 1 and out == ""


def test_a_text_of_other_characters_is_refused(gpt, theirs, tmp_path, capsys):
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    (tmp_path / "other.txt").write_text("0123456789" * 20, encoding="utf-8")
    options = "--weights", str(tmp_path / "theirs.pt"), "--input", str(tmp_path / "other.txt")
    assert gpt.main(["sample", *options]) == 2
    err = capsys.readouterr().err
    assert f"knows {len(set(TEXT))} characters" in err and "has 10: give it" in err
