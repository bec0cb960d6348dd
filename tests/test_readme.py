"""What README says of the five models: its table against the models, the text and a real run."""

import re

import pytest
from conftest import SCRIPT, gpt, needs_text
from test_command_line import run

README = SCRIPT.with_name("README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\d \S+) \| (.+?) \| (.*?) \| ([\d.]+) \| ([\d.]+) \|$", README, re.M)


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
    assert ROWS[0][:3] == ("0 counting", "pairs counted, not trained", "")
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
