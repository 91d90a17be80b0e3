"""The settings of a pruning: what is refused, and what the others mean."""

from __future__ import annotations

from fractions import Fraction

import pytest

from sparsefit import PruningConfig
from sparsefit.errors import ConfigError

GRANULARITIES = "'output', 'input', 'layer', 'variant'"

BAD_CONFIGS = [
    ({"sparsity": 1.0}, r"1\.0.*\[0, 1\)"),
    ({"sparsity": -0.1}, r"-0\.1"),
    ({"sparsity": float("nan")}, "nan"),
    ({"sparsity": float("inf")}, "inf"),
    ({"sparsity": True}, "True"),
    ({"sparsity": "0.5"}, "'0.5'"),
    *(({"pattern": text}, "pattern") for text in ("2-4", "2:4:8", "", "a:b", "4:4", "0:4", "5:4", "-1:4", " 2:4", 24)),
    ({"sparsity": 0.6, "pattern": "2:4"}, "contradicts"),
    ({"sparsity": 0.25, "pattern": "1:4"}, "contradicts"),
    *(
        ({"score": name}, "unknown score .*; the choices are wanda, magnitude")
        for name in ("wonda", "", None, ["wanda"])
    ),
    *(({"update": name}, "unknown update .*; the choices are block, none") for name in ("layers", None, "")),
    ({"update": "layer"}, "'layer' was removed.* use update 'block', or 'none'"),
    *(
        ({"granularity": form}, f"unknown granularity .*; the choices are {GRANULARITIES}")
        for form in (
            "row",
            "Output",
            "output,128",
            "(output)",
            "(output, 0)",
            "(output, -1)",
            "(output, 1.5)",
            "(layer, 2)",
            "variant:2",
            ("output",),
            ("output", 0),
            ("output", 2.0),
            ("output", True),
            ("output", "128"),
            ("layer", 2),
            ("input", 4, 4),
            128,
            {"output": 2},
        )
    ),
    *(
        ({"allocation": form}, "unknown allocation .*; the choices are uniform, owl, fisher, a mapping")
        for form in ("OWL", "", {}, 0.5, ["owl"], True)
    ),
    *(
        ({"allocation": {"q_proj": share}}, r"allocation gives .*q_proj.*\[0, 1\)")
        for share in (1.0, -0.1, float("nan"), "0.5", None, True)
    ),
    ({"allocation": {3: 0.5}}, "allocation gives"),
    *(({"owl_threshold": value}, "owl_threshold") for value in (-1.0, float("inf"), "5", None)),
    *(({"owl_spread": value}, "owl_spread") for value in (-0.1, float("nan"), None)),
    *(({"fisher_spread": value}, "fisher_spread") for value in (-0.1, "wide")),
    *(
        ({"reconstruction": name}, "unknown reconstruction .*; the choices are sequential, iterative, least_squares")
        for name in ("obs", "", True, "Sequential")
    ),
    *(({"swaps": value}, "swaps .*whole number of at least 0") for value in (-1, 1.5, True, None, "3")),
    *(
        ({"damping": value}, "damping .*of at least 0")
        for value in (-0.01, float("nan"), float("inf"), None, "0.01", True)
    ),
    *(({"device": value}, "device .*not a device to") for value in ("gpu", "", "cuda:x", 1.5, ["cpu"], "meta")),
    ({"targets": ()}, "targets is empty"),
    ({"targets": [1]}, "targets"),
    ({"targets": ("",)}, "targets"),
    ({"exclude": None}, "exclude"),
    ({"micro_batch_size": 0}, "micro_batch_size"),
    ({"micro_batch_size": True}, "micro_batch_size"),
    # What contradicts each other.
    ({"pattern": "2:4", "allocation": "uniform"}, "pattern '2:4' fixes .* leave out the allocation"),
    ({"pattern": "2:4", "allocation": {"q_proj": 0.5}}, "leave out the allocation"),
    ({"granularity": "variant", "allocation": "owl"}, "'variant' .* granularity 'output'"),
    ({"granularity": "variant", "reconstruction": "iterative"}, "'variant' .* granularity 'output'"),
    ({"reconstruction": "iterative", "swaps": 3}, "swaps=0, or reconstruction 'sequential' or 'least_squares'"),
]


@pytest.mark.parametrize(("settings", "cause"), BAD_CONFIGS, ids=[str(settings) for settings, _ in BAD_CONFIGS])
def test_settings_that_cannot_work_are_refused_by_name(settings, cause):
    with pytest.raises(ConfigError, match=cause):
        PruningConfig(**settings)


@pytest.mark.parametrize("form", ["", 0, (), False])
def test_an_empty_granularity_is_not_the_default(form):
    with pytest.raises(ConfigError, match=f"the choices are {GRANULARITIES}"):
        PruningConfig(granularity=form)


def test_weights_cannot_be_moved_to_where_they_have_no_values():
    with pytest.raises(ConfigError, match="meta"):
        PruningConfig(device="meta")


@pytest.mark.parametrize(
    "settings",
    [
        {"pattern": "2:4", "granularity": "variant", "reconstruction": "iterative"},
        {"granularity": "variant", "reconstruction": "sequential", "swaps": 2},
        {"allocation": "owl", "reconstruction": "iterative"},
        {"allocation": "fisher", "reconstruction": "iterative", "update": "none"},
        {"allocation": {"q_proj": 0}, "swaps": 0},
        {"device": "cuda:1", "states_on_cpu": True},
        {"damping": 0, "owl_threshold": 3},
    ],
    ids=str,
)
def test_settings_that_go_together(settings):
    config = PruningConfig(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


@pytest.mark.parametrize(
    ("settings", "share"), [({"sparsity": 0.75, "pattern": "1:4"}, 0.75), ({"pattern": "3:4"}, 0.25)]
)
def test_a_pattern_carries_its_own_sparsity(settings, share):
    assert PruningConfig(**settings).sparsity == share


def test_sparsity_is_the_decimal_it_is_written_as():
    assert PruningConfig(0.57).exact_sparsity == Fraction(57, 100)
    assert PruningConfig(pattern="1:3").exact_sparsity == Fraction(2, 3)


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("output", "output"),
        (("output", 1), "output"),
        (("output", 128), "(output, 128)"),
        ("(output, 128)", "(output, 128)"),
        ("output:128", "(output, 128)"),
        (["input", 3], "(input, 3)"),
        (None, "output"),
    ],
)
def test_a_granularity_has_one_name_however_it_is_given(form, name):
    config = PruningConfig(granularity=form)
    assert config.granularity == name
    assert PruningConfig(granularity=config.granularity) == config


@pytest.mark.parametrize(
    ("settings", "statistics"),
    [
        ({}, {"squared_norm"}),
        ({"score": "magnitude"}, set()),
        ({"score": "wanda_l1"}, {"abs_sum"}),
        ({"score": "wanda_linf"}, {"abs_max"}),
        ({"score": "sparsegpt"}, {"gram"}),
        ({"score": "magnitude", "swaps": 1}, {"gram"}),
        ({"reconstruction": "least_squares"}, {"squared_norm", "gram"}),
    ],
)
def test_only_what_is_needed_is_gathered(settings, statistics):
    config = PruningConfig(**settings)
    assert config.statistics == statistics
    assert config.needs_inputs == bool(statistics)
    assert all(PruningConfig(**settings, allocation=name).needs_inputs for name in ("owl", "fisher"))
