"""The notebook: model, optimizers, recipe, stops, mistakes, Jupyter, the shipped weights.
Oracles: the script's model, torch's own Muon, the files of a run, what the real run printed."""

import ast
import base64
import copy
import math
import random
import sys
from types import ModuleType
from unittest.mock import DEFAULT, Mock

import nbformat
import pytest
import torch
from conftest import SCRIPT, cores, gpt, needs_text, seeded, some_text
from nbclient import NotebookClient

NOTEBOOK = nbformat.read(SCRIPT.with_name("model.ipynb"), as_version=4)
CELLS = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
TAGGED = {tag: cell.source for cell in CELLS for tag in cell.metadata.get("tags", ())}
SHOWN = [out.data for cell in CELLS for out in cell.outputs if "data" in out]
TINY = dict(block_size=16, n_layer=2, n_head=2, n_embd=32, batch_size=8, dropout=0.1)
TINY |= dict(iterations=200, eval_interval=50, replaced=0.05, precision="float32")
TINY |= dict(text_path="text.txt", weights_path="weights.pt", prompt="I went to the gym today")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test works in a folder of its own, with a text of our own."""
    (tmp_path / "text.txt").write_text(some_text(1000), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepare(**settings):
    """A module with the cells before training, run with these settings, the others tiny."""
    run = ModuleType("cells")
    sys.modules["cells"] = run  # torch.compile looks there
    for cell in CELLS:
        if cell.source == TAGGED["training"]:
            run.set_rates = Mock(wraps=run.set_rates)
            return run
        exec(cell.source, vars(run))
        if cell.source == TAGGED["parameters"]:
            vars(run).update(TINY | settings)


def train(run, stop_after=None):
    """Run the training cell. The stop button is pressed after so many iterations."""
    if stop_after is not None:
        run.set_rates.side_effect = stop_after * [DEFAULT] + [KeyboardInterrupt]
    exec(TAGGED["training"], vars(run))
    run.set_rates.side_effect = None
    return run


def test_logits_are_those_of_the_script():
    config = gpt.Config(24, block_size=16, n_layer=2, n_head=4, n_embd=32)
    ours = gpt.initialize(gpt.gpt, config, seed=1)
    theirs = prepare(device_name="cpu").GPT(config)
    theirs.load_state_dict(ours.state_dict())
    idx = torch.randint(24, (3, 16))
    torch.testing.assert_close(theirs(idx), ours(idx), atol=1e-4, rtol=0)


def test_dropout_is_on_both_branches():
    block = prepare(device_name="cpu").Block(gpt.Config(65, dropout=1.0))
    x = torch.randn(3, 8, 65)
    assert torch.equal(block(x), x)


def movements(make, scale=1.0):
    """How far five steps along the same gradients, times `scale`, move some matrices."""
    generator = seeded(0)
    shapes = [(96, 32), (32, 32), (128, 32), (32, 128)] * 2
    starts = [torch.randn(shape, generator=generator) / 10 for shape in shapes]
    matrices = [torch.nn.Parameter(start.clone()) for start in starts]
    optimizer = make(matrices, lr=0.02, weight_decay=0.3)
    for _ in range(5):
        for matrix in matrices:
            matrix.grad = scale * torch.randn(matrix.shape, generator=generator)
        optimizer.step()
    return [(end - start).detach() for end, start in zip(matrices, starts)]


@pytest.mark.parametrize("scale", [1.0, 1e-8])
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32"])
def test_muon_moves_as_torchs_own(precision, scale):
    cells = prepare(precision=precision, device_name="cpu")
    ours = movements(cells.Muon, scale)
    theirs = movements(torch.optim.Muon)
    for our, their in zip(ours, theirs):
        assert (our - their).norm() < 0.03 * their.norm()


def test_an_iteration_trains_on_replaced_inputs():
    run = train(prepare(iterations=1, replaced=1.0, batch_size=300))
    run.loss_of = Mock(side_effect=run.loss_of)
    run.model.eval()  # as after an evaluation
    run.iteration()
    assert run.model.training
    x, y = run.loss_of.call_args.args
    train_text, _ = gpt.split(run.text, 16)
    assert all(run.decode(row) in train_text for row in y)
    assert not any(run.decode(row) in run.text for row in x)


def test_the_notebook_runs_in_jupyter(monkeypatch):
    monkeypatch.delenv("MPLBACKEND")
    notebook = copy.deepcopy(NOTEBOOK)
    for cell in notebook.cells:
        if cell.source == TAGGED["parameters"]:
            settings = TINY | {"iterations": 20, "device_name": "cpu"}
            cell.source += "".join(f"\n{name} = {settings[name]!r}" for name in settings)
    for line in (f'%run "{SCRIPT}" sample --weights weights.pt', "print('still here')"):
        notebook.cells.append(nbformat.v4.new_code_cell(line))
    NotebookClient(notebook, timeout=100).execute()
    outputs = sum([cell.get("outputs", []) for cell in notebook.cells], [])
    assert sum("image/png" in out.get("data", {}) for out in outputs) == 2
    errors = "".join(out.text for out in outputs if out.get("name") == "stderr")
    assert errors.count("\n") == 2  # the script's line of speed has two: no warnings
    assert "still here" in "".join(out.get("text", "") for out in outputs)


def test_after_a_stop_the_state_is_that_of_the_checkpoint():
    assert train(prepare(precision="float16"), stop_after=75).scaler.is_enabled()
    run = prepare(precision="float16")
    kept = torch.load("checkpoints/checkpoint.pt", run.device)
    assert list(dict(run.curve)) == [0, 50]
    assert run.seconds == kept["seconds"] > 0
    ours = [each.state_dict()["state"] for each in run.optimizers]
    theirs = [each["state"] for each in kept["optimizers"]]
    ours += [run.model.state_dict(), run.best]
    theirs += [kept["model"], kept["best"]]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_after_a_stop_training_goes_on():
    train(prepare(), stop_after=75)
    run = train(prepare(), stop_after=60)  # all cells again
    train(run)  # the training cell alone
    assert list(dict(run.curve)) == [0, 50, 100, 150, 200]
    counted = gpt.counted_bigram(run.train_ids, run.val_ids, len(run.vocab))[1]
    assert run.curve[-1][1] < counted - 0.1


def test_only_some_settings_may_change_on_the_way():
    run = train(prepare(iterations=20))
    assert run.settings()["digest"] == run.digest  # another text may not
    prepare(iterations=30, eval_interval=10, precision="bfloat16")  # these may
    with pytest.raises(AssertionError, match="dropout was 0.1, is 0.3.*another"):
        prepare(iterations=20, dropout=0.3)
    run.n_embd = 64
    with pytest.raises(AssertionError, match="settings have changed: run all cells"):
        train(run)


def test_the_best_weights_are_saved(folder):
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=1000)
    (folder / "text.txt").write_text("".join(letters), encoding="utf-8")
    run = train(prepare(replaced=0.0, prompt="x", n_embd=64), stop_after=190)
    _, after = "\n".join(cell.source for cell in CELLS).split(TAGGED["training"])
    exec(after, vars(run))
    step, lowest = min(run.curve, key=lambda point: point[1])
    assert lowest < run.curve[-1][1] - 0.1  # then it learned the letters by heart
    model, _, training = gpt.load(folder / "weights.pt")
    assert training["step"] == step
    assert training["val_loss"] == pytest.approx(lowest, abs=0.01)  # after rounding
    for key, ids in (("train_loss", run.train_ids), ("val_loss", run.val_ids)):
        loss = gpt.exact_loss(model, ids.cpu())
        assert loss == pytest.approx(training[key], abs=1e-5)


def test_a_seed_fixes_the_run():
    first = train(prepare(iterations=20, device_name="cpu"))
    again = train(prepare(iterations=20, device_name="cpu", checkpoint_dir="again"))
    assert first.curve == again.curve


def test_the_rates_fall_in_the_cooldown():
    run = train(prepare(iterations=100, cooldown=0.5, device_name="cpu"))
    paces = [call.args[0] for call in run.set_rates.call_args_list]
    assert paces == pytest.approx([min(1, 2 - step / 50) for step in range(100)])


def test_each_optimizer_has_its_settings():
    run = prepare(muon_decay=0.2, adamw_decay=0.1)
    run.set_rates(0.5)
    groups = [optimizer.param_groups[0] for optimizer in run.optimizers]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.2]
    assert [group["lr"] for group in groups] == [0.5 * run.adamw_lr, 0.5 * run.muon_lr]
    assert len(run.matrices) == 4 * run.n_layer  # those of Muon


def test_the_recipe_may_be_the_lectures():
    off = dict(muon_lr=0, adamw_lr=3e-4, adamw_decay=0.01, replaced=0, cooldown=0)
    run = train(prepare(**off, init_std=0.02, iterations=10))
    [optimizer] = run.optimizers
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["lr"] == pytest.approx(3e-4)
    assert torch.equal(run.corrupt(run.val_ids), run.val_ids)
    assert run.curve[0][1] == pytest.approx(math.log(len(run.vocab)), abs=0.05)


MISTAKES = [
    (dict(text_path="latin-1.txt"), "latin-1.txt is not UTF-8 .byte 1."),
    (dict(text_path="input.txt"), "cannot fetch .* save it as input.txt"),
    (dict(block_size=900), "needs more than 9,000"),
    (dict(n_head=3), "must be a multiple of n_head .3."),
    (dict(prompt="día"), "the prompt may only have"),
    (dict(weights_path="."), "[.] is a folder: name a file"),
    (dict(adamw_lr=1e30), "no loss at step 50: choose lower"),
]


@pytest.mark.parametrize("mistake, message", MISTAKES)
def test_a_mistake_gets_one_line(folder, monkeypatch, mistake, message):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network
    (folder / "latin-1.txt").write_bytes("día".encode("latin-1") * 1000)
    with pytest.raises(Exception, match=message) as error:
        train(prepare(**mistake))
    assert "\n" not in str(error.value)
    path = folder / "checkpoints/checkpoint.pt"
    assert not path.exists() or torch.load(path)["step"] == 0  # untrained


def test_the_shipped_file_has_the_record_of_the_run():
    _, _, training = gpt.load(gpt.WEIGHTS)
    [record] = [data["text/plain"] for data in SHOWN if "image/png" not in data]
    assert training == ast.literal_eval(record)


def test_losses_png_is_a_picture_of_the_run():
    losses, _ = [data["image/png"] for data in SHOWN if "image/png" in data]
    assert (SCRIPT.parent / "assets/losses.png").read_bytes() == base64.b64decode(losses)


def test_the_run_had_the_settings_of_a_gpu():
    _, _, training = gpt.load(gpt.WEIGHTS)
    settings = {"gpu": True}
    exec(TAGGED["parameters"], settings)
    same = settings.keys() & (training.keys() - {"precision"})
    assert len(same) == 15
    assert all(settings[name] == training[name] for name in same)
    assert training["digest"] == gpt.SHA256
    assert "interim" not in training


@needs_text
def test_the_shipped_weights_have_the_loss_that_they_claim():
    model, vocab, training = gpt.load(gpt.WEIGHTS)
    _, val_text = gpt.split(gpt.read_text(gpt.TEXT), model.config.block_size)
    cells = prepare(block_size=model.config.block_size, device_name="cpu")
    fused = cells.GPT(model.config)  # faster than the script's model
    fused.load_state_dict(model.state_dict())
    torch.set_num_threads(cores)
    loss = cells.exact_loss(fused, gpt.encode(val_text, vocab))
    torch.set_num_threads(1)
    assert loss == pytest.approx(training["val_loss"], abs=1e-4)
