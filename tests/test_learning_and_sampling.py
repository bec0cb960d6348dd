"""Training, exact losses, sampling and fetching, against independent calculations."""

import bisect
import hashlib
import math
import pickle
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import SCRIPT
from torch.nn import functional as F
from window_cost import window_losses


@pytest.fixture(scope="module")
def tiny(gpt):
    """A random model of two blocks, two heads and a window of 16."""
    config = gpt.Config(20, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.2)
    return gpt.initialize(gpt.gpt, config, seed=0)


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
    model = gpt.initialize(gpt.RUNGS[0][2], gpt.Config(6), seed=0)
    (*_, (step, loss)), training = gpt.train(model, data, val, 8, steps=1500, seed=1)
    assert step == training["step"] == 1500 and training["seed"] == 1
    assert loss == training["val_loss"] == pytest.approx(expected[1], abs=0.02)
    assert training["train_loss"] == pytest.approx(expected[0], abs=0.02)


def test_a_small_model_overfits_a_tiny_text(gpt):
    torch.manual_seed(0)
    # One character alone tells little of the next, but with those before it everything.
    data = torch.tensor([0, 1, 2, 0, 2, 1, 3, 2] * 8 + [0])
    model = gpt.initialize(gpt.gpt, gpt.Config(4), seed=0)
    gpt.train(model, data, data, 8, steps=200, seed=0)
    assert gpt.counted_bigram(data, data, 4)[0] > 0.6
    losses = F.cross_entropy(model(data[None, :8])[0], data[1:9], reduction="none")
    assert losses[1:].max() < 0.05


def test_training_keeps_its_best_weights(gpt):
    data, val = torch.randint(30, (2, 200), generator=torch.Generator().manual_seed(0))
    model = gpt.initialize(gpt.gpt, gpt.Config(30), seed=0)
    curve, training = gpt.train(model, data, val, 8, steps=300, seed=0)
    losses = [loss for _, loss in curve]
    assert len(curve) == 4 and losses[-1] > min(losses) + 0.5  # it overfits
    assert gpt.exact_loss(model, val, 8) == training["val_loss"] == min(losses)
    assert (training["step"], training["val_loss"]) in curve


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


def test_a_rung_s_first_weights_depend_on_the_seed_alone(gpt):
    """Not on the rungs that were made before it, nor on which of them there are."""
    config = gpt.Config(65)
    for make in (make for _, _, make in gpt.RUNGS):
        alone = gpt.initialize(make, config, seed=1).state_dict()
        gpt.initialize(lambda c: gpt.Model(c, [gpt.FeedForward]), config, seed=1)  # inserted
        again = gpt.initialize(make, config, seed=1).state_dict()
        other = gpt.initialize(make, config, seed=2).state_dict()
        assert all(torch.equal(alone[name], again[name]) for name in alone)
        assert not any(torch.equal(alone[name], other[name]) for name in alone if "ln" not in name)


def test_plain_sampling_draws_from_the_model_s_probabilities(gpt):
    """Of a bigram: each character depends on the one before it, as its row of the table says."""
    table = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, -1.0], [0.0, 0.0, 3.0]])
    bigram = torch.nn.Embedding.from_pretrained(table)
    idx, generator = torch.arange(3).repeat(4000)[:, None], torch.Generator().manual_seed(0)
    first, second = gpt.generate(bigram, idx, 8, 2, generator)
    for before, after in ((idx[:, 0], first), (first, second)):
        for row in range(3):
            shares = torch.bincount(after[before == row], minlength=3) / (before == row).sum()
            torch.testing.assert_close(shares, table[row].softmax(dim=0), atol=0.03, rtol=0)


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
    before = {name: set(vars(module)) for name, module in tiny.train().named_modules()}
    generator = torch.Generator().manual_seed(2)
    cached = list(gpt.generate_cached(tiny, idx, 50, **options, generator=generator))
    cached = torch.stack(cached, dim=1)
    assert not cached.requires_grad
    assert tiny.training
    assert before == {name: set(vars(module)) for name, module in tiny.named_modules()}
    generator = torch.Generator().manual_seed(2)
    assert torch.equal(cached, uncached(gpt, tiny, idx, 50, **options, generator=generator))


def test_cached_and_plain_sampling_write_the_same_within_the_window(gpt, tiny):
    idx = torch.randint(20, (3, 4), generator=torch.Generator().manual_seed(1))
    plain = gpt.generate(tiny, idx, 16, 12, torch.Generator().manual_seed(2))
    cached = gpt.generate_cached(tiny, idx, 12, generator=torch.Generator().manual_seed(2))
    for ids, same in zip(plain, cached, strict=True):
        assert torch.equal(ids, same)


def test_window_cost_is_that_of_sampling_beyond_the_window(gpt, tiny, monkeypatch):
    """Make `generate` draw a given text, and score it by the logits that it drew from."""
    data, chosen = torch.randint(20, (130,)), []

    def choose(logits, *_):
        target = data[18 + len(chosen)].view(1, 1)
        chosen.append(F.cross_entropy(logits, target[0]).item())
        return target

    monkeypatch.setattr(gpt, "choose", choose)
    # Eight ids, half a window, are what a refilled cache begins with; it lasts for nine draws.
    list(gpt.generate_cached(tiny, data[10:18][None], 9 * 12, temperature=1.0))
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
    assert set(gpt.choose(logits, 1e9, 3, generator).flatten().tolist()) == {1, 2, 3}


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


def step_by_step(model, idx):
    """The logits of a text, (1, T), one position at a time through the cache, as sampling does."""
    c = model.config
    cache = [torch.empty(2, 1, c.n_head, c.block_size, c.n_embd // c.n_head) for _ in model.blocks]
    with torch.inference_mode():
        return torch.cat([model(idx[:, i : i + 1], cache, i) for i in range(idx.shape[1])], dim=1)


def test_float16_reads_single_characters_in_float16_and_many_in_float32(
    gpt, tiny, tmp_path, monkeypatch
):
    weights = {name: tensor.half() for name, tensor in tiny.state_dict().items()}
    parts = {"config": vars(tiny.config), "vocab": "".join(map(chr, range(100, 120)))}
    torch.save(parts | {"model": weights, "training": {}}, tmp_path / "half.pt")
    model, exact = (gpt.load(tmp_path / "half.pt")[0] for _ in range(2))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    exact.float()
    idx = torch.randint(20, (1, 16))
    logits, exact_logits = step_by_step(model, idx), exact(idx)
    assert not torch.equal(logits, exact_logits)
    torch.testing.assert_close(logits.float(), exact_logits, rtol=0.01, atol=0.01)
    seen = []

    def choose(logits, *_):
        seen.append(logits.dtype)
        return logits.argmax(dim=-1, keepdim=True)

    monkeypatch.setattr(gpt, "choose", choose)
    for texts in (1, 3):
        list(gpt.generate_cached(model, idx.repeat(texts, 1), 3))  # the second starts a new window
    assert seen == 2 * [torch.float32] + [torch.float16] + 3 * [torch.float32]


@pytest.mark.long
@pytest.mark.skipif(not (SCRIPT.parent / "input.txt").exists(), reason="the text is not there")
def test_float16_costs_less_than_0_002(gpt, all_cores):
    """On 40 windows of the validation split, every character read by itself."""
    model, vocab, _ = gpt.load(gpt.WEIGHTS)
    assert model.lm_head.weight.dtype == torch.float16
    _, val_text = gpt.split(gpt.read_text(gpt.TEXT), 256)
    ids = gpt.encode(val_text[: 40 * 256 + 1], vocab)
    logits = [step_by_step(model, window[None])[0] for window in ids[:-1].split(256)]
    loss = F.cross_entropy(torch.cat(logits).float(), ids[1:]).item()
    exact = gpt.exact_loss(model.float(), ids, 256)
    assert loss != exact and loss == pytest.approx(exact, abs=0.002)


def test_a_save_that_fails_loses_nothing(gpt, tiny, tmp_path):
    path = tmp_path / "tiny.pt"
    path.write_bytes(b"earlier")
    with pytest.raises((AttributeError, pickle.PicklingError)):
        gpt.save(path, tiny, "", {"step": lambda: "no pickle holds this"})
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"earlier"]


def test_a_window_of_one_and_an_odd_one(gpt):
    for block_size in (1, 3):
        model = gpt.initialize(gpt.gpt, gpt.Config(5, block_size=block_size, n_embd=4), seed=0)
        idx = torch.zeros(2, 1, dtype=torch.long)
        assert len(list(gpt.generate_cached(model, idx, 10))) == 10


@pytest.fixture
def fetch(gpt, server, tmp_path, monkeypatch):
    """A function that reads a text which has to be fetched from a page of the server first."""
    monkeypatch.setattr(gpt, "TEXT", tmp_path / "input.txt")
    monkeypatch.setattr(gpt, "SHA256", hashlib.sha256(b"the text").hexdigest())

    def read(page):
        monkeypatch.setattr(gpt, "URL", server + page)
        return gpt.read_text(tmp_path / "input.txt")

    return read


def test_the_whole_text_is_fetched_or_nothing(gpt, fetch, tmp_path, capsys):
    pages = {"/cut": ConnectionError, "/none": ConnectionError, "/loop": ConnectionError}
    for page, kind in (pages | {"/bad": ConnectionError, "/other": gpt.UserError}).items():
        with pytest.raises(kind, match=f"(?s){page}.*save it yourself as .*input.txt"):
            fetch(page)
        assert not list(tmp_path.iterdir())
    assert fetch("/moved") == "the text"
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"the text"]
    assert fetch("/none") == "the text" and capsys.readouterr().err == ""  # it is there now


def test_a_python_without_root_certificates_is_told_how_to_get_them(gpt, fetch, monkeypatch):
    def fail(url, timeout):
        raise URLError("[SSL: CERTIFICATE_VERIFY_FAILED] unable to get local issuer certificate")

    monkeypatch.setattr(gpt, "urlopen", fail)
    with pytest.raises(ConnectionError, match="'Install Certificates.command'"):
        fetch("/moved")


def test_another_text_in_its_place_is_used_and_noticed(gpt, fetch, tmp_path, capsys):
    for content, notices in ((b"\xef\xbb\xbfthe text", 0), (b"my text", 1)):
        (tmp_path / "input.txt").write_bytes(content)
        assert fetch("/none") == content.decode("utf-8-sig")
        assert capsys.readouterr().err.count("is not Tiny Shakespeare") == notices


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
