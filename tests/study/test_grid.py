"""The points of a grid."""

from __future__ import annotations

from fractions import Fraction

import pytest

from sparsefit.errors import ConfigError
from sparsefit.study import Grid


def test_every_combination_is_a_point_and_what_comes_to_the_same_stands_once():
    grid = Grid(["magnitude", "wanda"], ["output", "layer"], [0.5, 0.7], ["2:4"], ["none", "block"])
    keys = [tuple(point.key.values()) for point in grid.points()]
    assert len(keys) == len(set(keys)) == (4 + 1) + 2 * (4 + 1)  # a magnitude is the same in any order
    assert ("wanda", "layer", "block", "", 0.7) in keys
    assert ("wanda", "", "none", "2:4", 0.5) in keys
    assert ("magnitude", "output", "none", "", 0.5) in keys


def test_granularities_of_their_own_and_settings_of_all():
    grid = Grid(["magnitude", "wanda"], ["own"], [0.57], settings={"exclude": ["head"], "swaps": 2})
    configs = [point.config for point in grid.points()]
    assert [config.granularity for config in configs] == ["layer", "output"]
    assert all(config.exclude == ("head",) and config.swaps == 2 for config in configs)
    assert all(config.exact_sparsity == Fraction(57, 100) for config in configs)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scores": []}, "grid is empty"),
        ({"scores": ["wandaa"]}, "unknown score 'wandaa'"),
        ({"sparsities": [1.5]}, r"sparsity is 1.5"),
        ({"settings": {"sparsity": 0.5}}, "sparsity, which the grid's own lists say"),
        ({"settings": {"swops": 2}}, "no setting 'swops': did you mean 'swaps'"),
        ({"patterns": ["4:2"]}, "keeps 4 of every 2"),
    ],
)
def test_wrong_grids_are_reported(settings, words):
    with pytest.raises(ConfigError, match=words):
        Grid(**settings).points()
