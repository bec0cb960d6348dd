"""Training, exact losses, sampling and fetching, against independent calculations."""

import bisect
import hashlib
import math
import time

import numpy as np
import pytest
import torch
from conftest import SCRIPT
from torch.nn import functional as F
from window_cost import window_losses


@pytest.fixture(scope="module")
def tiny(gpt):
    """A random model of two blocks, two heads and a window of 16."""
    torch.manual_seed(0)
    model = gpt.gpt(gpt.Config(20, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.2))
    return gpt.initialize(model, 0)


def markov_chain(length, size=6, seed=0):
    """Ids in which each depends on the one before it alone."""
    rng = np.random.default_rng(seed)
    table, ids = rng.dirichlet(np.full(size, 0.5), size=size), [0]
    for _ in range(length - 1):
        ids.append(rng.choice(size, p=table[ids[-1]]))
    return torch.tensor(ids)


def test_trained_bigram_comes_near_its_closed_form(gpt):
    data, val = gpt.split(markov_chain(20_000), 8)
    counts = np.ones((6, 6))
    for first, second in zip(data[:-1], data[1:]):
        counts[first, second] += 1
    chances = counts / counts.sum(axis=1, keepdims=True)
    expected = [
        -np.mean([math.log(chances[a, b]) for a, b in zip(s[:-1], s[1:])]) for s in (data, val)
    ]
    assert gpt.counted_bigram(data, val, 6) == pytest.approx(expected)
    model = gpt.initialize(gpt.RUNGS[0][2](gpt.Config(6)), 0)
    (*_, (step, loss)) = gpt.train(model, data, val, 8, steps=600, seed=1)
    assert step == 600 and loss == pytest.approx(expected[1], abs=0.02)


def test_a_small_model_overfits_a_tiny_text(gpt):
    torch.manual_seed(0)
    # One character alone tells little of the next, but with those before it everything.
    data = torch.tensor([0, 1, 2, 0, 2, 1, 3, 2] * 8 + [0])
    model = gpt.initialize(gpt.gpt(gpt.Config(4)), 0)
    gpt.train(model, data, data, 8, steps=200, seed=0)
    assert gpt.counted_bigram(data, data, 4)[0] > 0.6
    losses = F.cross_entropy(model(data[None, :8])[0], data[1:9], reduction="none")
    assert losses[1:].max() < 0.05


def test_training_keeps_its_best_weights(gpt):
    data, val = torch.randint(30, (2, 200), generator=torch.Generator().manual_seed(0))
    model = gpt.initialize(gpt.gpt(gpt.Config(30)), 0)
    curve = gpt.train(model, data, val, 8, steps=300, seed=0)
    losses = [loss for _, loss in curve]
    assert len(curve) == 5 and losses[-1] > min(losses) + 0.5  # it overfits
    assert gpt.exact_loss(model, val, 8) == min(losses)


@pytest.mark.parametrize("length", [5001, 4993, 17, 5])
def test_exact_loss_is_the_mean_over_every_character(gpt, tiny, length):
    data = torch.randint(20, (length,))
    losses = []
    for start in range(0, length - 1, 16):
        x, y = data[start : start + 16], data[start + 1 : start + 17]
        logits = tiny.eval()(x[None, : len(y)])[0]
        losses += F.cross_entropy(logits, y, reduction="none").tolist()
    tiny.train()
    assert gpt.exact_loss(tiny, data, 16) == pytest.approx(np.mean(losses), abs=1e-6)
    assert len(losses) == length - 1 and tiny.training


@torch.no_grad()
def uncached(gpt, model, idx, tokens, **options):
    """Recompute the window at each step; when it is full, go on from its last half."""
    window, drawn = idx[:, -16:], []
    model.eval()
    for _ in range(tokens):
        new = gpt.choose(model(window)[:, -1], **options)
        drawn.append(new)
        window = torch.cat((window[:, -7:] if window.shape[1] == 16 else window, new), dim=1)
    return torch.cat(drawn, dim=1)


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("length", [1, 9, 16, 40])
def test_cached_sampling_equals_uncached_within_and_beyond_the_window(
    gpt, tiny, temperature, length
):
    idx = torch.randint(20, (3, length), generator=torch.Generator().manual_seed(1))
    options = {"temperature": temperature, "top_k": 5}
    tiny.train()
    cached = gpt.generate(tiny, idx, 50, **options, generator=torch.Generator().manual_seed(2))
    cached = torch.stack(list(cached), dim=1)
    assert tiny.training and not cached.requires_grad
    generator = torch.Generator().manual_seed(2)
    assert torch.equal(cached, uncached(gpt, tiny, idx, 50, **options, generator=generator))


def test_window_cost_is_that_of_sampling_beyond_the_window(gpt, tiny, monkeypatch):
    """Make `generate` draw a given text, and score it by the logits that it drew from."""
    data, chosen = torch.randint(20, (130,)), []

    def choose(logits, *_):
        target = data[18 + len(chosen)].view(1, 1)
        chosen.append(F.cross_entropy(logits, target[0]).item())
        return target

    monkeypatch.setattr(gpt, "choose", choose)
    # Eight ids, half a window, are what a refilled cache begins with; it lasts for nine draws.
    list(gpt.generate(tiny, data[10:18][None], 9 * 12, temperature=1.0))
    tiny.eval()
    full, refilled = window_losses(tiny, data[1:])
    tiny.train()
    assert refilled == pytest.approx(np.mean(chosen), abs=1e-5)
    assert full != pytest.approx(refilled, abs=1e-4)


def test_top_k_and_temperature_draw_what_they_should(gpt):
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)
    drawn = gpt.choose(logits, 0.5, 2, generator)
    assert set(drawn.flatten().tolist()) == {2, 3}
    assert (drawn == 3).double().mean().item() == pytest.approx(1 / (1 + math.exp(-2)), abs=0.02)
    assert set(gpt.choose(logits, 1e-320, None, generator).flatten().tolist()) == {3}
    assert set(gpt.choose(logits, math.inf, 3, generator).flatten().tolist()) == {1, 2, 3}


def test_checkpoint_round_trip(gpt, tiny, tmp_path):
    vocab = "".join(map(chr, range(100, 120)))
    gpt.save(tmp_path / "tiny.pt", tiny, vocab, {"step": 7})
    model, same_vocab, training = gpt.load(tmp_path / "tiny.pt")
    idx = torch.randint(20, (2, 16))
    assert (same_vocab, training, model.config) == (vocab, {"step": 7}, tiny.config)
    config = torch.load(tmp_path / "tiny.pt", weights_only=True)["config"]
    names = ["vocab_size", "block_size", "n_layer", "n_head", "n_embd", "dropout"]
    assert list(config) == names and [path.name for path in tmp_path.iterdir()] == ["tiny.pt"]
    assert torch.equal(model(idx), tiny.eval()(idx))


def float16_product(self, x):
    """What a linear layer gives for one row in float16, for many: numbers rounded, sums not."""
    weight, bias = self.weight.float(), None if self.bias is None else self.bias.float()
    return F.linear(x.half().float(), weight, bias).half().float()


def test_float16_weights_of_linear_layers_stay_so_and_round_single_rows_alone(gpt, tiny, tmp_path):
    weights = {name: tensor.half() for name, tensor in tiny.state_dict().items()}
    parts = {"config": vars(tiny.config), "vocab": "".join(map(chr, range(100, 120)))}
    torch.save(parts | {"model": weights, "training": {}}, tmp_path / "half.pt")
    model, exact = (gpt.load(tmp_path / "half.pt")[0] for _ in range(2))
    kinds = {parameter.dtype for module in model.modules() if isinstance(module, gpt.Linear)
             for parameter in module.parameters()}  # fmt: skip
    others = (model.token_embedding, model.position_embedding, model.ln_f, model.blocks[0].ln1)
    assert kinds == {torch.float16} and {part.weight.dtype for part in others} == {torch.float32}
    exact.float()
    idx = torch.randint(20, (2, 16))
    assert torch.equal(model(idx), exact(idx))
    assert not torch.equal(model(idx[:1, :1]), exact(idx[:1, :1]))
    for module in (model.blocks[0].attention.qkv, model.blocks[1].feed_forward.down):
        row = torch.randn(1, 1, module.in_features)
        torch.testing.assert_close(module(row), float16_product(module, row), rtol=2e-3, atol=1e-3)


@pytest.mark.long
@pytest.mark.skipif(not (SCRIPT.parent / "input.txt").exists(), reason="the text is not there")
def test_float16_costs_less_than_0_002(gpt, monkeypatch, all_cores):
    """Whole windows at once, in each layer as if every position came by itself."""
    model, vocab, training = gpt.load(gpt.WEIGHTS)
    assert model.lm_head.weight.dtype == torch.float16
    _, val_text = gpt.split(gpt.read_text(gpt.TEXT), model.config.block_size)
    monkeypatch.setattr(gpt.Linear, "forward", float16_product)
    loss = gpt.exact_loss(model, gpt.encode(val_text, vocab), model.config.block_size)
    assert loss != training["val_loss"] and abs(loss - training["val_loss"]) < 0.002


def test_a_save_that_fails_loses_nothing(gpt, tiny, tmp_path):
    path = tmp_path / "tiny.pt"
    path.write_bytes(b"earlier")
    with pytest.raises(AttributeError):
        gpt.save(path, tiny, "", {"step": lambda: "no pickle holds this"})
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"earlier"]


def test_a_window_of_one_and_an_odd_one(gpt):
    for block_size in (1, 3):
        model = gpt.initialize(gpt.gpt(gpt.Config(5, block_size=block_size, n_embd=4)), 0)
        assert len(list(gpt.generate(model, torch.zeros(2, 1, dtype=torch.long), 10))) == 10


def test_fetching_writes_the_whole_text_or_nothing(gpt, server, tmp_path):
    path, digest = tmp_path / "input.txt", hashlib.sha256(b"the text").hexdigest()
    for page in ("/cut", "/none", "/loop", "/stalled", "/drip", "/text"):
        expected = "another" if page == "/text" else digest
        start = time.monotonic()
        with pytest.raises(gpt.UserError, match="save it yourself as") as error:
            gpt.fetch_text(path, server + page, expected, patience=1)
        assert page == "/cut" or (error.type == gpt.NotFetched) == (page != "/text")
        assert time.monotonic() - start < 5 and not list(tmp_path.iterdir())
    gpt.fetch_text(path, server + "/moved", digest)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"the text"]


def test_without_a_network_the_address_the_file_and_the_digest_are_named(gpt, tmp_path):
    with pytest.raises(gpt.UserError) as error:
        gpt.fetch_text(tmp_path / "input.txt", "http://127.0.0.1:9/text")
    for part in ("http://127.0.0.1:9/text", "input.txt", gpt.SHA256):
        assert part in str(error.value)


@pytest.mark.skipif(not (SCRIPT.parent / "input.txt").exists(), reason="the text is not there")
def test_the_real_text(gpt):
    text = gpt.read_text(gpt.TEXT)
    vocab = "".join(sorted(set(text)))
    assert (len(text), len(vocab)) == (1_115_394, 65)
    assert hashlib.sha256(gpt.TEXT.read_bytes()).hexdigest() == gpt.SHA256
    ids = gpt.encode(text, vocab)
    assert "".join(vocab[i] for i in ids[:1000]) == text[:1000]
    data, val = gpt.split(ids, 8)
    assert (len(data), len(val)) == (1_003_854, 111_540)
    assert gpt.counted_bigram(data, val, 65) == pytest.approx([2.4546, 2.4819], abs=5e-5)


@pytest.mark.skipif(not (SCRIPT.parent / "input.txt").exists(), reason="the text is not there")
def test_the_text_that_the_large_model_wrote_is_its_own(gpt):
    real, written = gpt.read_text(gpt.TEXT), gpt.read_text(gpt.MORE)
    assert len(written) == 500_000 and set(written) <= set(real)

    def shared(length):
        """Whether some run of `length` characters is in both."""
        runs = {hash(real[i : i + length]) for i in range(len(real) - length + 1)}
        return any(hash(written[i : i + length]) in runs for i in range(len(written) - length + 1))

    longest = bisect.bisect_left(range(1, 101), True, key=lambda length: not shared(length))
    assert 10 < longest < 100
