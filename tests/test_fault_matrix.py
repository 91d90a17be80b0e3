"""The short form of `scripts/fault_matrix.py`."""

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
    """The script: imported for these tests alone, as it needs to fork and sets variables of its process."""
    with pytest.MonkeyPatch.context() as changed:
        changed.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
        yield importlib.import_module("fault_matrix")


@pytest.fixture(scope="module")
def undisturbed(faults, tmp_path_factory):
    """A workplace, a run that nothing has happened to, what it came to, and how often it writes."""
    folder = tmp_path_factory.mktemp("faults").resolve()
    place, run = faults.Workplace(folder, steps=2), folder / "straight"
    counted = faults.Writes(run, sys.maxsize, faults.kill)
    assert place.command("fit", "--config", place.recipe(run), hook=counted) == 0, place.output
    return place, run, faults.outcome(run), int((folder / "count.txt").read_text())


def assert_fine(row, tried):
    assert (row.tried, row.lost, row.silent) == (tried, [], [])


def test_killed(faults, undisturbed):
    place, _, expected, writes = undisturbed
    row = faults.killed_at_writes(place, expected, writes, 2, random.Random())
    assert_fine(row, 2)
    assert row.gone_on == 2


def test_a_full_disk_is_one_sentence_and_nothing_is_lost(faults, undisturbed):
    place, _, expected, writes = undisturbed
    row = faults.full_disks(place, expected, writes, 2)
    assert_fine(row, row.tried)
    assert row.gone_on == row.tried >= 3
    assert row.told


def test_flipped_bits_are_named(faults, undisturbed):
    place, run, *_ = undisturbed
    row = faults.flipped_bits(place, run, 1, random.Random(), step=4)
    assert_fine(row, row.tried)
    assert row.told >= 4


def test_two_writers(faults, undisturbed, monkeypatch):
    place, _, expected, _ = undisturbed
    monkeypatch.setattr(faults.run_folder, "_ORPHANS_END", 0.1)
    assert_fine(faults.two_writers(place, expected), 1)


def test_hostile_folders(faults, undisturbed):
    place, run, *_ = undisturbed
    row = faults.hostile_folders(place, run, step=3)
    assert_fine(row, row.tried)
    assert row.told == row.tried


def test_nan_is_told_and_goes_nowhere(faults, undisturbed):
    place, _, expected, _ = undisturbed
    row = faults.not_finite(place, expected, first=1)
    assert_fine(row, 3)
    assert row.told == row.gone_on == 3


def test_what_is_wrong_is_seen(undisturbed):
    """The matrix itself: a run that ended otherwise is none that was gone on with."""
    from faults.outcomes import wrong_in

    place, run, expected, _ = undisturbed
    assert wrong_in(run, expected) is None
    other = shutil.copytree(run, place.folder / "other")
    assert "other values" in wrong_in(other, {name: value + 1 for name, value in expected.items()})
    shutil.rmtree(other / "model")
    assert wrong_in(other, expected) is not None
