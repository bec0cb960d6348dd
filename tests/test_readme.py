"""README: its table, commands, options and links, the loss of the shipped weights.
Oracles: the script, growth itself (`-m long`), the workflow, the shipped weights."""

import re
import shlex

import pytest
from conftest import SCRIPT, gpt, needs_text, run

ROOT = SCRIPT.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLE = [row.split(" | ") for row in re.findall(r"^\| (\d .*) \|$", README, re.M)]


def test_the_table_has_the_rungs_of_the_script():
    assert len(TABLE) == 1 + len(gpt.RUNGS)
    for number, (name, adds, make) in enumerate(gpt.RUNGS, 1):
        model = make(gpt.Config(65))
        size = sum(parameter.numel() for parameter in model.parameters())
        title, idea, _, part, parameters, *_ = TABLE[number]
        assert (title, idea, parameters) == (f"{number} {name}", adds, f"{size:,}")
        assert part.strip("`") in str(model)


@needs_text
def test_counting_has_the_losses_of_the_table():
    text = gpt.read_text(gpt.TEXT)
    vocab = gpt.vocabulary(text)
    splits = gpt.split(gpt.encode(text, vocab), block_size=8)
    losses = gpt.counted_bigram(*splits, len(vocab))
    assert TABLE[0][5:] == [f"{loss:.4f}" for loss in losses]


@needs_text
@pytest.mark.long
def test_growth_prints_the_table(tmp_path):
    printed = run("--out", tmp_path).stdout.decode().splitlines()[3:9]
    for row, line in zip(TABLE, printed, strict=True):
        assert line.split()[:-2] == f"{row[0]} {row[1]} {row[4]}".split()
        losses = [float(loss) for loss in line.split()[-2:]]
        assert losses == pytest.approx([float(loss) for loss in row[5:]], abs=0.01)


def test_the_figures_of_the_shipped_weights_are_on_the_page():
    _, _, training = gpt.load(gpt.WEIGHTS)
    assert README.count(f"{training['val_loss']:.4f}") == 2
    assert README.count(f"{training['seconds']:.0f} seconds") == 2


def test_the_quick_start_has_the_commands_of_the_workflow():
    workflow = (ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8")
    commands = re.findall(r"- run: (.*)", workflow)
    quick_start = README.split("\n## ")[1].splitlines()
    assert commands and commands == [line for line in quick_start if line in commands]


def test_the_script_takes_every_command():
    commands = re.findall(r"python bigram-to-gpt.py ?([^`\n]*)", README)
    assert len(commands) == 9
    for command in commands:
        gpt.parse(shlex.split(command))


def test_the_options_in_the_text_are_those_of_sample():
    options = re.findall("`--(.+?)[ `]", README)
    names = [option.replace("-", "_") for option in options]
    assert sorted(["action", *names]) == sorted(vars(gpt.parse(["sample"])))


def test_every_relative_link_leads_somewhere():
    headings = re.findall(r"^#+ (.*)", README, re.M)
    anchors = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
    links = [link for link in re.findall(r"\]\((.*?)\)", README) if ":" not in link]
    assert "assets/growth.png" in links
    for link in links:
        assert link.removeprefix("#") in anchors or (ROOT / link).exists()


def test_a_minute_of_the_lecture_is_linked_to_its_second():
    links = re.findall(r"\[([\d:]+)\]\(\S+\?t=(\d+)\)", README)
    assert len(links) == 5
    for time, total in links:
        hours, minutes, seconds = map(int, f"0:{time}".split(":")[-3:])
        assert 3600 * hours + 60 * minutes + seconds == int(total)
