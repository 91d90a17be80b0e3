"""The pages of the gallery run as a reader runs them, and print what they show."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from commands import Command

ROOT = Path(__file__).parents[1]
GALLERY = ROOT / "docs/gallery"
PAGES = sorted(page for page in GALLERY.glob("*.md") if page.name != "README.md")
BLOCK = re.compile(r'^```(?P<language>\w+)(?: title="(?P<file>[^"]+)")?\n(?P<text>.*?)^```$', re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_and_prints_what_it_shows(page, tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    printed, compared = "", 0
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        language, name, text = block["language"], block["file"], block["text"]
        if name and (tmp_path / name).exists():
            assert (tmp_path / name).read_text(encoding="utf-8") == text, f"{name} is not what the page shows"
        elif name:
            (tmp_path / name).write_text(text, encoding="utf-8")
        elif language == "bash":
            printed = output_of(text, tmp_path)
        else:
            assert language == "text", f"a block of {language} needs a file name: title="
            assert_shown(text, printed)
            compared += 1
    assert compared


def output_of(commands: str, folder: Path) -> str:
    """What commands print in a folder, one on each line; `$!` is the last one that ran in the background."""
    printed, last = "", None
    for line in commands.replace("\\\n", " ").splitlines():
        if line.startswith(("sparsefit ", "python ")):
            started = Command(shlex.split(line.removesuffix(" &")), folder, {"COLUMNS": "160"})
            if line.endswith(" &"):
                last = started
                continue
            ended = started.wait()
        else:
            shell = ["bash", "-euo", "pipefail", "-c", line.replace("$!", str(last and last.process.pid))]
            ended = subprocess.run(shell, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
        assert ended.returncode == 0, ended.stderr[-3000:]
        printed += ended.stdout
    if last is not None:
        last.wait()
    return printed


def assert_shown(shown: str, printed: str) -> None:
    """Each line is printed, in this order, with numbers within a tenth; "..." stands for anything."""
    assert shown.strip(" .\n"), "the page shows nothing"
    rest = iter(printed.splitlines())
    for line in filter(None, map(str.strip, shown.splitlines())):
        assert line == "..." or any(alike(line, other) for other in rest), f"no line like {line!r} in:\n{printed}"


def alike(shown: str, printed: str) -> bool:
    parts = [r"\s+".join(map(pattern, re.split(r"\s+", part))) for part in shown.split("...")]
    match = re.fullmatch(rf"\s*{'.*?'.join(parts)}\s*", printed)
    expected = NUMBER.findall(shown)
    return bool(match) and [number(text) for text in match.groups()] == pytest.approx(
        [number(text) for text in expected], rel=0.1
    )


def pattern(word: str) -> str:
    """A word as an expression, in which each number is a group."""
    return f"({NUMBER.pattern})".join(map(re.escape, NUMBER.split(word)))


def number(text: str) -> float:
    return float(text.replace(",", ""))


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("zeros 42.00%", "zeros 50.00%"),
        ("zeros 50.00%", "ones 50.00%"),
        ("first\nsecond", "second\nfirst"),
        ("a ... 1", "a few 2"),
    ],
)
def test_another_output_is_noticed(shown, printed):
    with pytest.raises(AssertionError, match="no line like"):
        assert_shown(shown, printed)


def test_the_index_lists_each_page():
    index = (GALLERY / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| \[.+?\]\((\w+)\.md\)", index, re.MULTILINE)) == [page.stem for page in PAGES]
