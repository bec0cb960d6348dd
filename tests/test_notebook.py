"""The notebook: its model is the script's, its runs go on after a stop, its outputs are real."""

import ast
import base64
import io
import math
import random
import re
import sys
import types
from contextlib import redirect_stdout

import nbformat
import pytest
import torch
from conftest import SCRIPT
from nbclient import NotebookClient

NOTEBOOK = SCRIPT.with_name("model.ipynb")


def read_notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(cell, tag):
    return tag in cell.metadata.get("tags", [])


def source_of(tag):
    """The source of the cell with this tag."""
    [source] = [cell.source for cell in code_cells(read_notebook()) if tagged(cell, tag)]
    return source


def settings_on_a_gpu():
    exec(source_of("parameters"), settings := {"gpu": True})
    return settings


def outputs_of(notebook):
    """All outputs in order, and the text that was printed among them."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return outputs, "".join(output.get("text", "") for output in outputs)


def module_with(source=""):
    """Run source as a module of its own, where torch.compile can find it by its name."""
    sys.modules["cells"] = module = types.ModuleType("cells")
    exec(compile(source, NOTEBOOK.name, "exec"), vars(module))
    return module


@pytest.fixture
def definitions():
    """What the notebook's imports, classes and functions define; nothing else of it is run."""
    kinds = ast.Import | ast.ImportFrom | ast.ClassDef | ast.FunctionDef
    body = [node for cell in code_cells(read_notebook())
            for node in ast.parse(cell.source).body if isinstance(node, kinds)]  # fmt: skip
    module = module_with(ast.unparse(ast.Module(body, [])))
    module.device = torch.device("cpu")
    return module


@pytest.fixture
def tiny(tmp_path):
    """Small settings, and a text of our own."""
    words = ["I went", "to", "the", "gym", "today", "and", "far", "away,\n"]
    text = " ".join(random.Random(1).choices(words, k=1000))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    sizes = dict(block_size=16, n_layer=2, n_head=2, n_embd=32, batch_size=8, dropout=0.1)
    steps = dict(iterations=200, eval_interval=50, replaced=0.05, precision="bfloat16")
    paths = dict(text_path="text.txt", checkpoint_dir="kept", weights_path="weights.pt")
    return sizes | steps | {name: str(tmp_path / path) for name, path in paths.items()}


@pytest.fixture
def train(tiny, monkeypatch):
    """A function that runs the cells: `stop_at` presses the stop button before that iteration.

    `then` changes names after the training cell, which is run once more. With `whole`, the cells
    that follow are run, too.
    """
    monkeypatch.setenv("MPLBACKEND", "Agg")

    def run(stop_at=None, then=None, whole=False, **others):
        names, printed = vars(module := module_with()), io.StringIO()
        with redirect_stdout(printed):
            for cell in code_cells(read_notebook()):
                if tagged(cell, "training") and stop_at is not None:
                    names["set_rates"] = stopping(names["set_rates"], stop_at)
                exec(compile(cell.source, NOTEBOOK.name, "exec"), names)
                if tagged(cell, "parameters"):
                    assert (tiny | others).keys() <= names.keys()
                    names.update(tiny | others)
                if tagged(cell, "training"):
                    if then is not None:
                        names.update(then)
                        exec(compile(cell.source, NOTEBOOK.name, "exec"), names)
                    if not whole:
                        break
        module.printed = printed.getvalue()
        return module

    return run


def stopping(set_rates, iteration):
    count = 0

    def set_rates_and_stop(pace):
        nonlocal count
        set_rates(pace)
        count += pace > 0  # it is 0 only while a CUDA graph is captured
        if pace > 0 and count == iteration + 1:
            raise KeyboardInterrupt

    return set_rates_and_stop


# ---------------------------------------------------------------------------------- the same model


@pytest.mark.parametrize("sizes", [(65, 8, 1, 1, 65), (7, 16, 2, 4, 32), (30, 5, 3, 1, 12)])
def test_notebook_and_script_give_the_same_logits(gpt, definitions, sizes):
    config = gpt.Config(*sizes, dropout=0.2)
    ours = gpt.initialize(gpt.gpt, config, seed=1).eval()
    theirs = definitions.GPT(config).eval()
    theirs.load_state_dict(ours.state_dict())
    idx = torch.randint(sizes[0], (3, sizes[1]))
    torch.testing.assert_close(theirs(idx), ours(idx), atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [17, 33, 700, 701])
def test_notebook_and_script_give_the_same_exact_loss(gpt, definitions, length):
    config, ids = gpt.Config(20, 16, 1, 2, 32), torch.randint(20, (length,))
    model = gpt.initialize(gpt.gpt, config, seed=1)
    definitions.block_size = 16
    expected = gpt.exact_loss(model, ids, 16)
    assert definitions.exact_loss(model, ids) == pytest.approx(expected, abs=1e-5)


def test_the_settings_on_a_gpu_are_the_specification(definitions):
    s = settings_on_a_gpu()
    names = "batch_size block_size iterations n_embd n_head n_layer dropout"
    assert [s[name] for name in names.split()] == [64, 256, 5000, 384, 6, 6, 0.2]
    config = types.SimpleNamespace(vocab_size=65, **s)
    model = definitions.GPT(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 10_788_929


def test_attention_maps_are_the_weights_with_which_attention_mixes(gpt, definitions):
    model = definitions.GPT(gpt.Config(30, 16, 2, 4, 32, dropout=0.2)).eval()
    idx, second = torch.randint(30, (10,)), model.blocks[1]
    maps = definitions.attention_maps(model, idx, 1)  # (4, 10, 10)
    x = model.token_embedding(idx) + model.position_embedding.weight[:10]
    x = second.ln1(model.blocks[0](x[None]))  # (1, 10, 32)
    values = second.attention.qkv(x)[0, :, 64:].view(10, 4, 8).transpose(0, 1)  # (4, 10, 8)
    mixed = (maps @ values).transpose(0, 1).reshape(10, 32)
    torch.testing.assert_close(second.attention.proj(mixed), second.attention(x)[0])


# -------------------------------------------------------------------------------------------- Muon


def travel(make, scale=1.0, dtype=torch.float32):
    """How far five steps along the same gradients, times `scale`, move some matrices."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(96, 32), (32, 32), (128, 32), (32, 128)] * 2
    matrices = [torch.randn(shape, generator=generator) / 10 for shape in shapes]
    matrices = [torch.nn.Parameter(matrix.to(dtype)) for matrix in matrices]
    before = [matrix.detach().clone() for matrix in matrices]
    optimizer = make(matrices, lr=0.02, weight_decay=0.3)
    for _ in range(5):
        for matrix in matrices:
            matrix.grad = scale * torch.randn(matrix.shape, generator=generator).to(dtype)
        optimizer.step()
    return [(after - start).detach() for after, start in zip(matrices, before)]


def farthest(ours, theirs):
    """The largest relative distance between two lists of matrices."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, theirs))


def test_muon_moves_as_torchs_own(definitions):
    definitions.dtype = torch.bfloat16
    assert farthest(travel(definitions.Muon), travel(torch.optim.Muon)) < 0.03


def test_muon_in_float32_is_as_good_as_in_float64(definitions):
    definitions.dtype = torch.float32
    ours = travel(definitions.Muon)
    definitions.dtype = torch.float64
    exact = travel(definitions.Muon, dtype=torch.float64)
    assert farthest([matrix.double() for matrix in ours], exact) < 1e-4


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32"])
def test_muon_does_not_care_how_large_the_gradients_are(definitions, precision):
    definitions.dtype = getattr(torch, precision)
    assert farthest(travel(definitions.Muon, scale=1e-8), travel(definitions.Muon)) < 0.01


# ---------------------------------------------------------------------------------------- the whole


def test_the_notebook_runs_and_the_script_loads_what_it_saves(
    gpt, tiny, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = read_notebook()
    place = [tagged(cell, "parameters") for cell in notebook.cells].index(True)
    cell = nbformat.v4.new_code_cell("\n".join(f"{name} = {tiny[name]!r}" for name in tiny))
    notebook.cells.insert(place + 1, cell)
    notebook.cells.insert(0, nbformat.v4.new_code_cell("import socket\nsocket.getaddrinfo = None"))
    NotebookClient(notebook, timeout=100).execute()
    outputs, printed = outputs_of(notebook)
    assert {output.get("name") for output in outputs} <= {"stdout", None}  # no warnings
    weights = tmp_path / "weights.pt"
    _, _, training = gpt.load(weights)
    assert training["interim"] and training["step"] % 50 == 0
    losses = [f"{training[key]:.4f}" for key in ("train_loss", "val_loss")]
    line = "weights of step {}: train {}, validation {}".format(training["step"], *losses)
    assert line in printed
    assert re.search(r"the rest takes about \d+\.\d minutes", printed)

    text = tmp_path / "text.txt"
    assert gpt.main(["evaluate", "--weights", str(weights), "--input", str(text)]) == 0
    rows = [line.split()[1:3] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [[loss, loss] for loss in losses]
    prompt = ["--prompt", "I went to the gym today", "--tokens", "50"]
    assert gpt.main(["sample", "--weights", str(weights), *prompt]) == 0


def test_a_stopped_run_goes_on_and_ends_as_one_that_was_not(train, tiny):
    tiny.update(iterations=600, eval_interval=100)
    at_once = train().curve
    tiny["checkpoint_dir"] += "-in-parts"
    stopped = train(stop_at=330)
    assert [step for step, _ in stopped.curve] == [0, 100, 200, 300]
    rest = train()
    assert "is at step 300: going on from there" in rest.printed
    assert [step for step, _ in rest.curve] == [step for step, _ in at_once]
    assert rest.curve[-1][1] == pytest.approx(at_once[-1][1], abs=0.02)
    assert rest.seconds > stopped.seconds > 0


def test_the_training_cell_alone_goes_on_where_it_was_stopped(train):
    run = train(stop_at=75, then={})
    assert "stopped at iteration 76" in run.printed
    assert [step for step, _ in run.curve] == [0, 50, 100, 150, 200]


def test_a_stop_during_an_evaluation_or_a_step_does_no_harm(train):
    """Dropout is on again, and the scaler of float16 starts anew."""
    run = train(precision="float16", iterations=100)
    run.model.eval()
    run.scaler.scale(run.loss_of(*run.get_batch(run.train_ids))).backward()
    run.scaler.step(run.optimizers[0])  # and no update
    run.iterations = run.started_with["iterations"] = 110
    with redirect_stdout(io.StringIO()):
        exec(source_of("training"), vars(run))
    assert run.step == 110 and math.isfinite(run.curve[-1][1])
    run.model.eval()
    run.iteration()
    assert run.model.training


def test_a_stopped_run_gives_what_it_has(gpt, train, tmp_path):
    run = train(stop_at=120, whole=True)
    _, _, training = gpt.load(tmp_path / "weights.pt")
    assert training["interim"] and training["step"] == 100
    assert training["val_loss"] == pytest.approx(run.curve[-1][1], abs=1e-3)


def test_a_finished_run_can_be_made_longer_but_not_another(train, tiny, tmp_path):
    train()
    assert not (tmp_path / "weights.pt").exists()  # only the cells after training write it
    assert [step for step, _ in train(iterations=250).curve] == [0, 50, 100, 150, 200, 250]
    train(precision="float32", eval_interval=10, iterations=250)
    for name, was, value in (("dropout", 0.1, 0.3), ("seed", 1, 2), ("iterations", 250, 100)):
        line = f"checkpoint.pt: .*{name} was {was}, is {value}.*another checkpoint_dir"
        with pytest.raises(AssertionError, match=line):
            train(**{name: value})
    shorter = (tmp_path / "text.txt").read_bytes()[1:]
    (tmp_path / "text.txt").write_bytes(shorter)
    with pytest.raises(AssertionError, match="digest was"):
        train(iterations=250)


@pytest.mark.parametrize("change", [{"iterations": 300}, {"n_embd": 64}, {"replaced": 0.2}])
def test_settings_that_change_between_cells_are_noticed(train, change):
    with pytest.raises(AssertionError, match="the settings have changed: run all cells"):
        train(then=change)


def test_float16_learns(train):
    run = train(precision="float16")
    assert run.scaler.is_enabled() and run.curve[-1][1] < run.curve[1][1] < 1.5


def test_with_all_its_parts_off_the_recipe_is_the_lectures(train):
    off = dict(muon_lr=0, adamw_lr=3e-4, adamw_decay=0.01, replaced=0, cooldown=0, init_std=0.02)
    run = train(**off, iterations=10)
    [optimizer] = run.optimizers
    assert type(optimizer) is torch.optim.AdamW
    [group] = optimizer.param_groups
    assert group["lr"].item() == pytest.approx(3e-4) and group["weight_decay"] == 0.01
    assert torch.equal(run.corrupt(run.val_ids), run.val_ids)
    assert run.GPT(run.config).blocks[0].feed_forward.up.weight.std() > 0.08  # PyTorch's own
    assert run.curve[0][1] == pytest.approx(math.log(len(run.vocab)), abs=0.05)  # nearly uniform


def test_the_learning_rates_fall_to_zero_over_the_cooldown(train, tmp_path):
    rates = []
    for step in (50, 125, 199):
        run = train(stop_at=step, cooldown=0.5, checkpoint_dir=str(tmp_path / f"{step}"))
        rates.append(run.optimizers[0].param_groups[0]["lr"].item() / run.adamw_lr)
    assert rates == pytest.approx([1, 0.75, 0.01])


def test_a_share_of_the_inputs_is_replaced_and_no_target(train):
    run = train(iterations=10)
    run.replaced = 0.25
    x = torch.zeros(100, 100, dtype=torch.long, device=run.device)
    share = (run.corrupt(x) != x).float().mean().item()
    assert share == pytest.approx(0.25 * (1 - 1 / len(run.vocab)), abs=0.03)
    assert not x.any()

    run.replaced, batch_loss = 1.0, run.loss_of

    def loss_of(x, y):
        assert all(run.decode(row) in run.text for row in y)
        assert not any(run.decode(row) in run.text for row in x)
        return batch_loss(x, y)

    run.loss_of = loss_of
    run.iteration()


def test_a_run_without_a_loss_ends_with_one_line(train, tiny):
    with pytest.raises(AssertionError, match="no loss at step 50: choose lower learning rates"):
        train(adamw_lr=1e30)
    kept = torch.load(tiny["checkpoint_dir"] + "/checkpoint.pt")
    assert kept["step"] == 0


MISTAKES = [
    (dict(text_path="my-book.txt"), "No such file or directory.*my-book.txt"),
    (dict(text_path="latin-1.txt"), "latin-1.txt is not UTF-8 .byte 1.: convert it"),
    (dict(text_path="input.txt"), "cannot fetch https://raw.* save it as input.txt"),
    (dict(block_size=500), "needs more than 5,000 characters"),
    (dict(n_head=3), r"n_embd \(32\) must be a multiple of n_head \(3\)"),
    (dict(batch_size=0), "must be 1 or more"),
    (dict(prompt="día"), "the prompt may only have these characters"),
    (dict(weights_path="folder"), "folder is a folder: name a file"),
]


@pytest.mark.parametrize("mistake, line", MISTAKES)
def test_a_mistake_is_found_before_training(train, tmp_path, monkeypatch, mistake, line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")  # no network
    (tmp_path / "latin-1.txt").write_bytes("día".encode("latin-1") * 1000)
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(Exception, match=line):
        train(**mistake)
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "kept"] == before


def test_a_home_directory_can_be_written_as_a_tilde(train, tmp_path, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    paths = dict(text_path="~/text.txt", checkpoint_dir="~/kept", weights_path="~/weights.pt")
    train(iterations=10, whole=True, **paths)
    assert (tmp_path / "weights.pt").exists() and (tmp_path / "kept/checkpoint.pt").exists()


def test_a_full_gpu_is_told_what_to_do(train, monkeypatch):
    def backward(loss):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with pytest.raises(RuntimeError, match="lower batch_size"):
        train()


def test_a_gpu_that_cannot_compute_is_not_used(monkeypatch, capsys):
    def eye(size, device):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "eye", eye)
    module = module_with(code_cells(read_notebook())[0].source)
    assert module.gpu is False
    assert "WARNING: torch cannot use the GPU, so the CPU is used: no" in capsys.readouterr().out


# ------------------------------------------------------------------------ what the repository holds


@pytest.fixture(scope="module")
def committed():
    """The notebook as it was last run, its outputs, and all that its cells printed."""
    notebook = read_notebook()
    return notebook, *outputs_of(notebook)


def test_the_committed_notebook_is_one_complete_run(committed):
    notebook, outputs, printed = committed
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    kinds = {output.output_type for output in outputs}
    assert kinds == {"stream", "display_data", "execute_result"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    assert "10,788,929 parameters" in printed
    assert not re.search(r"/(home|root|tmp|work|mnt|usr|opt|Users)/", nbformat.writes(notebook))


def test_the_shipped_weights_are_those_of_the_committed_notebook(gpt, committed):
    _, outputs, printed = committed
    model, _, training = gpt.load(gpt.WEIGHTS)
    assert sum(parameter.numel() for parameter in model.parameters()) == 10_788_929
    [shown] = [each.data["text/plain"] for each in outputs if each.output_type == "execute_result"]
    assert ast.literal_eval(shown) == training
    losses = training["step"], training["train_loss"], training["val_loss"]
    assert "weights of step {}: train {:.4f}, validation {:.4f}".format(*losses) in printed
    assert training["hardware"] in printed


def test_the_shipped_weights_are_those_of_the_specification(gpt):
    _, _, training = gpt.load(gpt.WEIGHTS)
    assert "interim" not in training
    settings = settings_on_a_gpu()
    same = settings.keys() & training.keys() - {"precision"}
    assert len(same) == 15 and all(settings[name] == training[name] for name in same)


def test_the_pictures_are_those_of_the_committed_notebook(committed):
    _, outputs, _ = committed
    pictures = [each.data["image/png"] for each in outputs if each.output_type == "display_data"]
    files = [SCRIPT.with_name("assets") / f"{name}.png" for name in ("losses", "attention")]
    assert [base64.b64decode(each) for each in pictures] == [file.read_bytes() for file in files]


def test_the_shipped_weights_have_the_same_logits_in_the_notebook(gpt, definitions):
    ours = gpt.load(gpt.WEIGHTS)[0].float()
    theirs = definitions.GPT(ours.config).eval()
    theirs.load_state_dict(ours.state_dict())
    idx = torch.randint(65, (2, 256))
    with torch.inference_mode():
        torch.testing.assert_close(theirs(idx), ours(idx), atol=1e-4, rtol=0)


@pytest.mark.skipif(not SCRIPT.with_name("input.txt").exists(), reason="needs Tiny Shakespeare")
def test_the_shipped_weights_have_the_loss_that_they_claim(gpt, all_cores):
    model, vocab, training = gpt.load(gpt.WEIGHTS)
    _, val_text = gpt.split(gpt.read_text(gpt.TEXT), model.config.block_size)
    loss = gpt.exact_loss(model.float(), gpt.encode(val_text, vocab), model.config.block_size)
    assert loss == pytest.approx(training["val_loss"], abs=1e-4)
