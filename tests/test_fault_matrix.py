"""A short form of `scripts/fault_matrix.py`."""

from __future__ import annotations

import importlib
import os
import random
import shutil
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="its runs are forked")]


@pytest.fixture(scope="module")
def faults():
    """The script. It is imported only for these tests, as it needs to fork and sets environment variables."""
    with pytest.MonkeyPatch.context() as changed:
        changed.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
        yield importlib.import_module("fault_matrix")


@pytest.fixture(scope="module")
def without_fault(faults, tmp_path_factory):
    """The commands, a run without a fault, its outcome, and its number of writes."""
    folder = tmp_path_factory.mktemp("faults").resolve()
    commands, run = faults.ForkedCommands(folder, steps=2), folder / "straight"
    counted = faults.Writes(run, sys.maxsize, faults.kill)
    assert commands.run("fit", "--config", commands.recipe(run), hook=counted) == 0, commands.output
    return commands, run, faults.outcome(run), int((folder / "count.txt").read_text())


def assert_fine(row, tried):
    assert (row.tried, row.lost, row.silent) == (tried, [], [])


def test_killed(faults, without_fault):
    commands, _, expected, writes = without_fault
    row = faults.killed_at_writes(commands, expected, writes, 2, random.Random())
    assert_fine(row, 2)
    assert row.resumed == 2


def test_a_full_disk_is_reported_and_nothing_is_lost(faults, without_fault):
    commands, _, expected, writes = without_fault
    row = faults.full_disks(commands, expected, writes, 2)
    assert_fine(row, row.tried)
    assert row.resumed == row.tried >= 3
    assert row.reported


def test_flipped_bits_are_named(faults, without_fault):
    commands, run, *_ = without_fault
    row = faults.flipped_bits(commands, run, 1, random.Random(), step=4)
    assert_fine(row, row.tried)
    assert row.reported >= 4


def test_two_writers(faults, without_fault, monkeypatch):
    commands, _, expected, _ = without_fault
    monkeypatch.setattr(faults.run_folder, "_ORPHANS_END", 0.1)
    assert_fine(faults.two_processes(commands, expected), 1)


def test_hostile_folders(faults, without_fault):
    commands, run, *_ = without_fault
    row = faults.hostile_folders(commands, run, step=3)
    assert_fine(row, row.tried)
    assert row.reported == row.tried


def test_nan_is_reported_and_not_written(faults, without_fault):
    commands, _, expected, _ = without_fault
    row = faults.not_finite(commands, expected, first=1)
    assert_fine(row, 3)
    assert row.reported == row.resumed == 3


def test_differences_from_the_reference_run_are_found(without_fault):
    from faults.outcomes import wrong_in

    commands, run, expected, _ = without_fault
    assert wrong_in(run, expected) is None
    other = shutil.copytree(run, commands.folder / "other")
    assert "other values" in wrong_in(other, {name: value + 1 for name, value in expected.items()})
    shutil.rmtree(other / "model")
    assert "FileNotFoundError" in wrong_in(other, expected)
