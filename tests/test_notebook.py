"""The notebook: its model is the script's, its runs go on after a stop, its outputs are real."""

import ast
import base64
import copy
import math
import random
import re
import sys
import types
from unittest.mock import Mock

import nbformat
import pytest
import torch
from conftest import SCRIPT, cores, gpt, needs_text, seeded, some_text
from nbclient import NotebookClient
from torch.nn import functional as F

NOTEBOOK = nbformat.read(SCRIPT.with_name("model.ipynb"), as_version=4)
CELLS = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
TAGGED = {tag: cell.source for cell in CELLS for tag in cell.metadata.get("tags", ())}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Small settings, in a folder with a text of our own."""
    (tmp_path / "text.txt").write_text(some_text(1000), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    sizes = dict(block_size=16, n_layer=2, n_head=2, n_embd=32, batch_size=8, dropout=0.1)
    steps = dict(iterations=200, eval_interval=50, replaced=0.05, precision="bfloat16")
    paths = dict(text_path="text.txt", weights_path="weights.pt")
    return sizes | steps | paths | dict(prompt="I went to the gym today")


@pytest.fixture
def train(tiny, monkeypatch):
    """A function that runs the cells, to the end of training or to the very end.

    `stop_at` presses the stop button after so many iterations of this run. The module that it
    returns also has `paces`: the shares of the full learning rates that were set, except 0.
    """

    def train(stop_at=None, to_the_end=False, **others):
        module, paces = types.ModuleType("cells"), []
        monkeypatch.setitem(sys.modules, "cells", module)  # torch.compile looks there

        def set_rates(pace):  # it is 0 only while a CUDA graph is captured
            set_rates_alone(pace)
            paces.extend([pace] if pace else [])
            if len(paces) - 1 == stop_at:
                raise KeyboardInterrupt

        for cell in CELLS:
            if cell.source == TAGGED["training"]:
                module.paces, set_rates_alone, module.set_rates = paces, module.set_rates, set_rates
            exec(cell.source, vars(module))
            if cell.source == TAGGED["parameters"]:
                assert (tiny | others).keys() <= vars(module).keys()
                vars(module).update(tiny | others)
            if cell.source == TAGGED["training"] and not to_the_end:
                break
        return module

    return train


@pytest.mark.parametrize("sizes", [(65, 8, 1, 1, 65), (24, 16, 2, 4, 32), (30, 5, 3, 1, 12)])
def test_notebook_and_script_have_the_same_logits_losses_and_samples(train, monkeypatch, sizes):
    ours = gpt.initialize(gpt.gpt, gpt.Config(*sizes, dropout=0.2), seed=1).eval()
    run = train(iterations=1, device_name="cpu")
    theirs = run.GPT(ours.config)
    theirs.load_state_dict(ours.state_dict())
    V, T = sizes[:2]
    assert (run.URL, run.SHA256) == (gpt.URL, gpt.SHA256)
    run.block_size, run.vocab = T, "".join(map(chr, range(97, 97 + V)))
    ids = torch.randint(V, (701,))
    expected = gpt.exact_loss(ours, ids)
    assert run.exact_loss(theirs.train(), ids) == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(theirs(ids[None, :T]), ours(ids[None, :T]), atol=1e-4, rtol=0)
    drawn = gpt.generate(ours, torch.zeros(1, 1).long(), 30, seeded(1))
    assert run.write(theirs.train(), "", 30) == "a" + gpt.decode(drawn, run.vocab)
    monkeypatch.setattr(F, "dropout", spy := Mock(side_effect=lambda x, *_: x))
    torch.testing.assert_close(theirs.train()(ids[None, :T]), theirs.eval()(ids[None, :T]))
    assert [call.args[1] for call in spy.call_args_list] == 4 * len(theirs.blocks) * [0.2]


def test_attention_maps_are_the_weights_with_which_attention_mixes(train):
    notebook = train(iterations=1, to_the_end=True, device_name="cpu")
    model = notebook.GPT(gpt.Config(30, 16, 2, 4, 32, dropout=0.2)).eval()
    idx, second = torch.randint(30, (10,)), model.blocks[1]
    maps = notebook.attention_maps(model, idx, 1)  # (4, 10, 10)
    x = model.token_embedding(idx) + model.position_embedding.weight[:10]
    x = second.ln1(model.blocks[0](x[None]))  # (1, 10, 32)
    values = second.attention.qkv(x)[0, :, 64:].view(10, 4, 8).transpose(0, 1)  # (4, 10, 8)
    mixed = (maps @ values).transpose(0, 1).reshape(10, 32)
    torch.testing.assert_close(second.attention.proj(mixed), second.attention(x)[0])


def movements(make, scale=1.0):
    """How far five steps along the same gradients, times `scale`, move some matrices."""
    generator = seeded(0)
    shapes = [(96, 32), (32, 32), (128, 32), (32, 128)] * 2
    before = [torch.randn(shape, generator=generator) / 10 for shape in shapes]
    matrices = [torch.nn.Parameter(matrix.clone()) for matrix in before]
    optimizer = make(matrices, lr=0.02, weight_decay=0.3)
    for _ in range(5):
        for matrix in matrices:
            matrix.grad = scale * torch.randn(matrix.shape, generator=generator)
        optimizer.step()
    return [(after - start).detach() for after, start in zip(matrices, before)]


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32"])
def test_muon_moves_as_torchs_own_however_small_the_gradients_are(train, precision):
    notebook = train(iterations=1, precision=precision, device_name="cpu")
    for scale in (1.0, 1e-8):
        for ours, theirs in zip(movements(notebook.Muon, scale), movements(torch.optim.Muon)):
            assert (ours - theirs).norm() < 0.03 * theirs.norm()


def test_inputs_are_replaced_by_any_character_and_targets_are_not(train):
    run = train(iterations=1, replaced=0.25)
    x = torch.zeros(100, 100, dtype=torch.long, device=run.device)
    share = (run.corrupt(x) != x).float().mean().item()
    assert share == pytest.approx(0.25 * (1 - 1 / len(run.vocab)), abs=0.03)
    run.replaced, run.batch_size, run.loss_of = 1.0, 300, Mock(side_effect=run.loss_of)
    run.model.eval()
    run.iteration()
    x, y = run.loss_of.call_args.args
    assert all(run.decode(row) in gpt.split(run.text, 16)[0] for row in y)  # of the training split
    assert not any(run.decode(row) in run.text for row in x) and run.model.training


def test_the_notebook_runs_in_jupyter_and_so_does_the_script(tiny, monkeypatch):
    monkeypatch.delenv("MPLBACKEND")
    notebook = copy.deepcopy(NOTEBOOK)
    for cell in notebook.cells:
        if cell.source == TAGGED["parameters"]:
            cell.source += "".join(f"\n{k} = {tiny[k]!r}" for k in tiny) + "\ndevice_name = 'cpu'"
    for line in (f'%run "{SCRIPT}" sample --weights weights.pt', "print('on')"):
        notebook.cells.append(nbformat.v4.new_code_cell(line))
    NotebookClient(notebook, timeout=100).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output.get("text", "") for output in outputs)
    assert printed.endswith("on\n") and re.search(r"the rest takes about \d+\.\d minutes", printed)
    _, line, _ = "".join(o.text for o in outputs if o.get("name") == "stderr").split("\n")
    assert "characters per second" in line  # of the script, and no warnings
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_a_stopped_run_goes_on_with_the_state_that_it_kept_and_learns(train, capsys, precision):
    assert [step for step, _ in train(stop_at=75, precision=precision).curve] == [0, 50]
    assert "stopped at iteration 76" in capsys.readouterr().out
    run = train(stop_at=0, precision=precision, device_name="cpu")
    assert "is at step 50: going on from there" in capsys.readouterr().out
    kept = torch.load("checkpoints/checkpoint.pt", map_location="cpu", weights_only=True)
    ours, theirs = [run.model.state_dict(), run.best], [kept["model"], kept["best"]]
    for optimizer, state in zip(run.optimizers, kept["optimizers"], strict=True):
        ours, theirs = [*ours, optimizer.state_dict()["state"]], [*theirs, state["state"]]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert run.seconds == kept["seconds"] > 0
    exec(TAGGED["training"], vars(run))  # the training cell alone goes on, too
    assert [step for step, _ in run.curve] == [0, 50, 100, 150, 200]
    counted = gpt.counted_bigram(run.train_ids, run.val_ids, len(run.vocab))[1]
    assert run.curve[-1][1] < counted - 0.1
    assert run.scaler.is_enabled() == (precision == "float16")
    assert [step for step, _ in train(iterations=210).curve[4:]] == [200, 210]


def test_a_checkpoint_of_other_settings_is_refused(train):
    run = train(iterations=20)
    train(iterations=20, eval_interval=10, precision="float32")  # these settings may change
    with pytest.raises(AssertionError, match="dropout was 0.1, is 0.3.*another checkpoint_dir"):
        train(iterations=20, dropout=0.3)
    run.text_path.write_text(some_text(999), encoding="utf-8")
    with pytest.raises(AssertionError, match="digest was"):
        train(iterations=20)
    run.n_embd = 64
    with pytest.raises(AssertionError, match="the settings have changed: run all cells"):
        exec(TAGGED["training"], vars(run))


def test_a_stopped_run_saves_its_best_weights_and_their_exact_losses(train, tmp_path, monkeypatch):
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=1000)
    (tmp_path / "text.txt").write_text("".join(letters), encoding="utf-8")
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    paths = dict(text_path="~/text.txt", checkpoint_dir="~/kept", weights_path="~/weights.pt")
    run = train(stop_at=190, to_the_end=True, replaced=0.0, prompt="x", n_embd=64, **paths)
    assert (tmp_path / "kept/checkpoint.pt").exists()
    model, _, training = gpt.load(tmp_path / "weights.pt")
    splits = run.train_ids.cpu(), run.val_ids.cpu()
    losses = [gpt.exact_loss(model, ids) for ids in splits]
    assert [training["train_loss"], training["val_loss"]] == pytest.approx(losses, abs=1e-5)
    curve = dict(run.curve)
    assert curve[training["step"]] == min(curve.values()) == pytest.approx(losses[1], abs=1e-3)
    assert curve[150] > losses[1] + 0.1 and training["interim"]  # it overfitted


def test_a_seed_fixes_the_run_and_the_rates_fall_in_the_cooldown(train):
    settings = dict(iterations=100, cooldown=0.5, device_name="cpu")
    run = train(**settings)
    assert train(**settings, checkpoint_dir="again").curve == run.curve
    assert run.paces == pytest.approx([min(1, 2 - step / 50) for step in range(100)])
    assert len(run.matrices) == 4 * run.n_layer  # those that Muon trains
    for optimizer, full_rate in zip(run.optimizers, (run.adamw_lr, run.muon_lr), strict=True):
        assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.02 * full_rate)


def test_with_all_its_parts_off_the_recipe_is_the_lectures(train):
    off = dict(muon_lr=0, adamw_lr=3e-4, adamw_decay=0.01, replaced=0, cooldown=0, init_std=0.02)
    run = train(**off, iterations=10)
    [optimizer] = run.optimizers
    [group] = optimizer.param_groups
    assert type(optimizer) is torch.optim.AdamW and group["weight_decay"] == 0.01
    assert group["lr"].item() == pytest.approx(3e-4) and set(run.paces) == {1}
    assert torch.equal(run.corrupt(run.val_ids), run.val_ids)
    assert run.curve[0][1] == pytest.approx(math.log(len(run.vocab)), abs=0.05)  # nearly uniform


MISTAKES = [
    (dict(text_path="my-book.txt"), "No such file or directory.*my-book.txt"),
    (dict(text_path="latin-1.txt"), "latin-1.txt is not UTF-8 .byte 1.: convert it"),
    (dict(text_path="input.txt"), "cannot fetch https://raw.* save it as input.txt"),
    (dict(block_size=900), "needs more than 9,000 characters"),
    (dict(n_head=3), r"n_embd \(32\) must be a multiple of n_head \(3\)"),
    (dict(batch_size=0), "must be 1 or more"),
    (dict(prompt="día"), "the prompt may only have these characters"),
    (dict(weights_path="."), "[.] is a folder: name a file"),
    (dict(adamw_lr=1e30), "no loss at step 50: choose lower learning rates"),
]


@pytest.mark.parametrize("mistake, message", MISTAKES)
def test_a_mistake_gets_one_line_and_is_not_saved(train, tmp_path, monkeypatch, mistake, message):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network
    (tmp_path / "latin-1.txt").write_bytes("día".encode("latin-1") * 1000)
    with pytest.raises(Exception, match=message) as error:
        train(**mistake)
    assert "\n" not in str(error.value)
    kept = tmp_path / "checkpoints/checkpoint.pt"
    assert torch.load(kept)["step"] == 0 if "adamw_lr" in mistake else not kept.exists()


def test_a_gpu_that_cannot_compute_is_not_used(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "eye", Mock(side_effect=RuntimeError("no kernel image")))
    exec(CELLS[0].source, names := {})
    assert names["gpu"] is False
    assert "torch cannot use the GPU, so the CPU is used: no kernel" in capsys.readouterr().out


def test_the_shipped_weights_are_those_of_the_committed_run_with_the_settings_of_a_gpu():
    model, _, training = gpt.load(gpt.WEIGHTS)
    assert sum(parameter.numel() for parameter in model.parameters()) == 10_788_929
    assert model.lm_head.weight.dtype == torch.float32  # float16 in the file
    assert [cell.execution_count for cell in CELLS] == list(range(1, len(CELLS) + 1))
    outputs = [output for cell in CELLS for output in cell.outputs]
    printed = "".join(output.get("text", "") for output in outputs)
    [shown] = [each.data["text/plain"] for each in outputs if each.output_type == "execute_result"]
    assert ast.literal_eval(shown) == training and "interim" not in training
    losses = training["step"], training["train_loss"], training["val_loss"]
    assert "weights of step {}: train {:.4f}, validation {:.4f}".format(*losses) in printed
    exec(TAGGED["parameters"], settings := {"gpu": True})
    same = settings.keys() & training.keys() - {"precision"}
    assert len(same) == 15 and all(settings[name] == training[name] for name in same)
    assert training["digest"] == gpt.SHA256
    pictures = [each.data["image/png"] for each in outputs if each.output_type == "display_data"]
    losses_png = SCRIPT.with_name("assets") / "losses.png"
    assert base64.b64decode(pictures[0]) == losses_png.read_bytes()
    readme = SCRIPT.with_name("README.md").read_text(encoding="utf-8")
    assert readme.count(f"{training['val_loss']:.4f}") == 2
    assert readme.count(f"{training['seconds']:.0f} seconds") == 2


@needs_text
def test_the_shipped_weights_have_the_loss_that_they_claim():
    torch.set_num_threads(cores)
    model, vocab, training = gpt.load(gpt.WEIGHTS)
    _, val_text = gpt.split(gpt.read_text(gpt.TEXT), model.config.block_size)
    loss = gpt.exact_loss(model, gpt.encode(val_text, vocab))
    torch.set_num_threads(1)
    assert loss == pytest.approx(training["val_loss"], abs=1e-4)
