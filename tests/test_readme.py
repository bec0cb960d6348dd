"""README against the project: its table, commands, options and links."""

import re
import shlex

import pytest
from conftest import SCRIPT, gpt, needs_text
from test_command_line import run

ROOT = SCRIPT.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CELLS = [line.strip("| ").split(" | ") for line in README.splitlines() if re.match(r"\| \d ", line)]
ROWS = [(*row[:2], *row[4:]) for row in CELLS]  # as growth prints them


def test_the_rungs_are_those_of_the_script():
    found = []
    for number, (name, adds, make) in enumerate(gpt.RUNGS, start=1):
        size = sum(parameter.numel() for parameter in make(gpt.Config(65)).parameters())
        found.append((f"{number} {name}", adds, f"{size:,}"))
    assert [row[:3] for row in ROWS[1:]] == found


@needs_text
def test_counting_has_the_losses_that_the_table_says():
    text = gpt.read_text(gpt.TEXT)
    vocab = gpt.vocabulary(text)
    losses = gpt.counted_bigram(*gpt.split(gpt.encode(text, vocab), 8), len(vocab))
    assert CELLS[0][:4] == ["0 counting", "pairs counted, not trained", "", "`counted_bigram`"]
    assert ROWS[0][3:] == tuple(map("{:.4f}".format, losses))


@needs_text
@pytest.mark.long
def test_growth_prints_the_table(tmp_path):
    result = run("--out", tmp_path)
    printed = result.stdout.decode().splitlines()[3:9]
    for row, line in zip(ROWS, printed, strict=True):
        assert " ".join(row[:3]).split() == line.split()[:-2]
        losses = [float(loss) for loss in line.split()[-2:]]
        assert losses == pytest.approx([float(loss) for loss in row[3:]], abs=0.01)


def test_each_rung_names_a_class_of_its_model():
    for (_, _, make), cells in zip(gpt.RUNGS, CELLS[1:], strict=True):
        assert cells[3].strip("`") in str(make(gpt.Config(65)))


def test_the_quick_start_has_the_commands_of_the_workflow():
    workflow = (ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8")
    commands = re.findall(r"- run: (.*)", workflow)
    quick_start = README.split("\n## ")[1].splitlines()
    assert [line for line in quick_start if line in commands] == commands != []


def test_every_command_of_the_script_is_one_that_it_takes():
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
