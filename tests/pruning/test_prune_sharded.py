"""Models that FSDP2 has split over ranks: pruned in place, as one process prunes them whole."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from ranks import on_ranks
from sharded_models import ON_FOUR, POINTS, make_models, pruned, pruned_together

from sparsefit.errors import MaskError
from sparsefit.pruning import MaskSet

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dense_models():
    return make_models()


@pytest.fixture(scope="module")
def alone(dense_models):
    return pruned(dense_models, 0, 1)


@pytest.fixture(scope="module")
def two_ranks():
    """What each rank has found."""
    return on_ranks(2, pruned_together, 2)


@pytest.fixture(scope="module")
def four_ranks():
    return on_ranks(4, pruned_together, 4)


def check_same_as_alone(expected, first, *others):
    assert first["digest"] == expected["digest"]
    assert first["account"] == expected["account"]
    assert first["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, atol=1e-4, rtol=1e-3)
    for other in others:
        assert other["digest"] == first["digest"]
        assert all(torch.equal(other["weights"][name], weight) for name, weight in first["weights"].items())


@pytest.mark.parametrize("point", [*POINTS, ("llama", "statistics")], ids="-".join)
def test_masks_weights_and_account_of_two_ranks_are_those_of_one_process(alone, two_ranks, point):
    check_same_as_alone(alone[point], *(found["pruned"][point] for found in two_ranks))


@pytest.mark.parametrize("point", ON_FOUR, ids="-".join)
def test_so_are_those_of_four_ranks(alone, four_ranks, point):
    check_same_as_alone(alone[point], *(found["pruned"][point] for found in four_ranks))


def test_blocks_that_cannot_be_run_one_by_one_are_noted_on_all_ranks(alone, two_ranks):
    for found in two_ranks:
        assert found["pruned"]["in between", "wanda"]["notes"][0].endswith(alone["in between", "wanda"]["notes"][0])


@pytest.mark.parametrize("place", ["the first pass", "a capturing pass", "the first block", "the second block"])
def test_an_error_on_one_rank_ends_all_with_its_reason_and_the_dense_model(two_ranks, place):
    (others, dense), (own, own_dense) = (found["broken off"][place] for found in two_ranks)
    assert own == "MemoryError: no memory is left"
    assert others == "RuntimeError: on rank 1: MemoryError: no memory is left"
    assert (dense, own_dense) == (True, True)


def test_data_and_progress_that_fail_on_one_rank_end_all(two_ranks):
    first, second = (found["broken off"] for found in two_ranks)
    assert first["progress"] == ("RuntimeError: on rank 1: TimeoutError: time is up", True)
    assert second["progress"] == ("TimeoutError: time is up", True)
    (others, dense), (own, own_dense) = first["data"], second["data"]
    assert own.startswith("CalibrationError: the inputs of model.layers.0.self_attn.q_proj.weight are NaN")
    assert others == own.replace(": ", ": on rank 1: ", 1)
    assert (dense, own_dense) == (True, True)


def test_an_error_of_the_rank_that_writes_ends_all(two_ranks):
    first, second = (found["broken off"]["writing"][0] for found in two_ranks)
    assert first == "OSError: the disk is full"
    assert second == "RuntimeError: on rank 0: OSError: the disk is full"


def test_a_model_that_was_given_back_is_pruned_as_if_nothing_had_been(alone, two_ranks):
    for found in two_ranks:
        assert found["broken off"]["afterwards"][0] == alone["llama", "wanda"]["digest"]


def test_masks_are_applied_and_verified_on_shards(dense_models, two_ranks):
    for found in (found["masks"] for found in two_ranks):
        assert found["dense"].startswith("MaskError: pruned weights are not zero in 8 of 8 matrices")
        error, adopted = found["applied"]
        masks, model = MaskSet.from_state_dict(found["masks"]), copy.deepcopy(dense_models["gpt2"])
        assert (error, adopted["digest"]) == (None, masks.digest())
        masks.apply(model)
        assert all(torch.equal(adopted["weights"][name], weight) for name, weight in model.named_parameters())
        assert f"{next(iter(masks))} (" in found["broken"]
        assert found["broken"] == two_ranks[0]["masks"]["broken"]
    with pytest.raises(MaskError):
        masks.verify(dense_models["gpt2"])


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        ("columns", r"blocks.0.0.weight has the placements \(Shard\(dim=1\),\) on a mesh of \(2,\)"),
        ("replicas", r"blocks.0.0.weight has the placements \(Replicate\(\), Shard\(dim=0\)\) on a mesh of \(2, 1\)"),
        ("products", r"blocks.0.2.weight has the placements \(Shard\(dim=0\),\), but is in no module"),
        ("device", "the model is sharded over ranks, whose devices compute: leave out device"),
        ("fisher", "allocation 'fisher' needs gradients, and the model is sharded over ranks: use allocation 'owl'"),
    ],
)
def test_what_cannot_be_pruned_in_place_is_refused_before_anything_changes(two_ranks, layout, reason):
    for found in two_ranks:
        error, unchanged = found["refused"][layout]
        assert unchanged
        assert re.match(f"ConfigError: {reason}", error), error
