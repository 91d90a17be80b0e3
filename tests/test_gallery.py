"""The pages of the gallery run as a reader runs them, and print what they show."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
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
    """What commands print in a folder, with the `python` and the `sparsefit` of this environment."""
    lines = commands.replace("\\\n", " ").splitlines()
    if all(line.startswith(("sparsefit ", "python ")) for line in lines):
        ended = [Command(shlex.split(line), folder, {"COLUMNS": "160"}).wait() for line in lines]
        assert not any(one.returncode for one in ended), ended[-1].stderr[-3000:]
        return "".join(one.stdout for one in ended)
    # What needs a shell.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "COLUMNS": "160"}
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


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
