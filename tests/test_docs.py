"""The site: every page is in its navigation, every public name in its reference, and it builds without a warning."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import sparsefit

ROOT = Path(__file__).parents[1]
SETTINGS = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def pages_of(navigation) -> list[str]:
    if isinstance(navigation, str):
        return [navigation]
    parts = navigation.values() if isinstance(navigation, dict) else navigation
    return [page for part in parts for page in pages_of(part)]


def test_the_navigation_names_every_page_once():
    folders = (ROOT / "docs", ROOT / "configs", ROOT / "examples")
    pages = ["README.md", *(str(page.relative_to(ROOT)) for folder in folders for page in folder.rglob("*.md"))]
    assert sorted(pages_of(SETTINGS["nav"])) == sorted(pages)


def package_sections() -> dict[str, str]:
    """The sections of the page of files, by the folder in their heading; "" for files outside packages."""
    _, *sections = re.split(r"^## ", (ROOT / "docs/files.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    heading = re.compile(r"`(\w+)/`")
    return {found[1] if (found := heading.match(section)) else "": section for section in sections}


def package_folders() -> dict[str, Path]:
    """The folders with modules; those of files that the page lists in the section of a package belong to it."""
    package = ROOT / "src/sparsefit"
    folders = [path for path in package.iterdir() if (path / "__init__.py").exists() and path.name != "callbacks"]
    return {"": package, "callbacks": ROOT / "callbacks"} | {path.name: path for path in folders}


def test_the_page_of_files_has_a_section_for_each_package():
    assert set(package_sections()) == set(package_folders())


@pytest.mark.parametrize("folder", package_folders())
def test_the_page_of_files_names_every_module_and_no_others(folder):
    section, path = package_sections()[folder], package_folders()[folder]
    files = path.glob("*.py") if folder in ("", "callbacks") else path.rglob("*.py")
    modules = {file.stem for file in files} - {"__init__", "__main__"}
    assert modules - set(re.findall(r"`(\w+)`", section)) == set()
    first_columns = re.findall(r"^\| (`.+?) \|", section, re.MULTILINE)
    assert {name for cell in first_columns for name in re.findall(r"`(\w+)`", cell)} - modules == set()


def names_on(page: str) -> set[str]:
    """The names on a page of the reference, as they are imported."""
    text = (ROOT / f"docs/api/{page}.md").read_text(encoding="utf-8")
    named = re.findall(r"^::: (\S+)(?:\n    options:\n      heading: (\S+))?", text, re.MULTILINE)
    return {heading or name for name, heading in named}


@pytest.mark.parametrize("package", ["callbacks", "modules", "data", "evaluation"])
def test_the_reference_has_the_public_names_of_a_package(package):
    full = f"sparsefit.{package}"
    assert {name.rpartition(".")[2] for name in names_on(package)} == set(importlib.import_module(full).__all__)


def test_the_reference_has_the_names_of_sparsefit_and_no_others_that_are_not_there():
    pages = {page.stem: names_on(page.stem) for page in (ROOT / "docs/api").glob("*.md")}
    names = set().union(*pages.values())
    assert {f"sparsefit.{name}" for name in sparsefit.__all__} <= names
    for name in names - {"sparsefit.errors"}:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    command = [sys.executable, "scripts/build_docs.py", "--site-dir", str(tmp_path / "site")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(pages_of(SETTINGS["nav"]))  # and the page of what is not found
    fetched = re.compile(r"<(?:script|img|iframe|link)\b[^>]*(?:src|href)=[\"']?(?:https?:)?//[^>]*")
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not fetched.findall(text), page
        assert "&gt;&gt;&gt;" not in re.sub(r"<code.*?</code>", "", text, flags=re.DOTALL), page
