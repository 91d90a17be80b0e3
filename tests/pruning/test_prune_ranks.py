"""Ranks that prune one model together: each solves some of the input groups, and all end with the same weights."""

from __future__ import annotations

import copy
from unittest.mock import patch

import pytest
import torch
from ranks import on_ranks
from tiny_models import two_blocks

from sparsefit import PruningConfig, collect_statistics, prune, prune_from_statistics
from sparsefit.calibration.batches import calibration_data
from sparsefit.errors import DivergenceError, MaskError
from sparsefit.pruning.scores import SCORES, Score
from sparsefit.pruning.undo import Undo
from sparsefit.ranks import errors_on_all_ranks, own_rank
from sparsefit.recovery.finite_checks import FiniteWatch

pytestmark = pytest.mark.slow

SAMPLES = torch.randint(3, 61, (9, 12), generator=torch.Generator().manual_seed(0))
SHARES = {1: [9], 2: [6, 3], 4: [4, 2, 2, 1]}  # samples of each rank
METHODS = {
    "wanda": {},
    "none": {"update": "none"},
    "2:4": {"pattern": "2:4"},
    "layer": {"granularity": "layer"},
    "owl": {"allocation": "owl"},
    "fisher": {"allocation": "fisher"},
    "magnitude": {"score": "magnitude"},
    "swaps": {"swaps": 5},
    "sparsegpt": {"score": "sparsegpt", "reconstruction": "iterative"},
    "sequential": {"reconstruction": "sequential"},
    "least_squares": {"swaps": 5, "reconstruction": "least_squares"},
}
MODELS = ("llama", "mixtral", "gpt2")


def pairs(ranks):
    """Models and methods: all of them, but by four ranks each model with one of the methods that share work out."""
    return [
        (model, method) for model in MODELS for method in METHODS if ranks < 4 or model == "llama" or method == "swaps"
    ]


def share_of(rank, ranks):
    shares = SHARES[ranks]
    return [{"input_ids": one} for one in SAMPLES[sum(shares[:rank]) : sum(shares[: rank + 1])].split(2)]


def state_of(model, result):
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {"digest": result.masks.digest(), "weights": weights, "errors": result.layer_errors, "notes": result.notes}


def pruned_by_all_methods(models, rank, ranks):
    """What each model is after each method, and how many matrices this rank has scored in it."""
    found, scored = {}, []
    plain = SCORES["wanda"]

    def counting(*args):
        scored.append(own_rank())
        return plain.function(*args)

    SCORES["counting"] = Score(counting, plain.granularity, plain.needs)
    methods = METHODS | {"counting": {"score": "counting", "swaps": 2}}
    for name, method in [*pairs(ranks), ("llama", "counting")]:
        one = copy.deepcopy(models[name])
        found[name, method] = state_of(one, prune(one, share_of(rank, ranks), PruningConfig(**methods[method])))
    one, runs = copy.deepcopy(models["llama"]), []
    one.model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    same = [{"input_ids": part} for part in SAMPLES.split(3)]  # on every rank
    found["llama", "same data"] = state_of(one, prune(one, same, PruningConfig(swaps=3, micro_batch_size=1)))
    found["llama", "same data"]["samples"] = len(runs)
    config = PruningConfig(update="none", reconstruction="least_squares")
    statistics = collect_statistics(models["llama"], share_of(rank, ranks), [config])
    one = copy.deepcopy(models["llama"])
    found["llama", "statistics"] = state_of(one, prune_from_statistics(one, statistics, config))
    return found, len(scored)


def told_apart(rank, ranks):
    """How many batches each rank keeps of texts that are its own, and of texts that all ranks have."""
    kept = []
    for texts in ([f"{rank}{number}" for number in range(8)], [str(number) for number in range(8)]):
        batches = [{"text": [text], "scale": torch.tensor(2.0)} for text in texts]
        kept.append(len(calibration_data(torch.nn.Flatten(), batches, 1, print, "the test")))
    return kept


def scored_without_data(model):
    """How many matrices this rank scores where the score needs no data."""
    scored = []

    def counting(weight):
        scored.append(1)
        return weight.abs()

    SCORES["counting magnitude"] = Score(counting, "output", ())
    prune(copy.deepcopy(model), config=PruningConfig(score="counting magnitude"))
    return len(scored)


def failing_apart(rank):
    """What each rank raises if the first two fail in different ways."""
    try:
        with errors_on_all_ranks():
            if rank == 0:
                raise MaskError("one that may be caught")
            if rank == 1:
                raise MemoryError("no memory is left")
    except Exception as error:
        return str(error)


def watched_losses(rank):
    """What each rank raises if the loss of one is NaN, and a gradient scaler checks the gradients."""
    watch = FiniteWatch()
    watch.add_loss(torch.tensor(torch.nan if rank == 1 else 1.0))
    try:
        watch.check(7, [])
    except DivergenceError as error:
        return str(error)


def failures(model, rank):
    """What each rank raises where one of them fails, and whether its model is dense again."""

    def no_memory(*_):
        raise MemoryError("no memory is left")

    def last_step(done, total):
        if rank == 1 and done == total:
            raise TimeoutError("time is up")

    def failing_score(weight, norms):
        if rank == 1:
            raise MemoryError("no memory is left")
        return weight.abs() * norms.sqrt()

    SCORES["failing"] = Score(failing_score, "output", ("squared_norm",))
    reported = {}
    cases = {"score": {"score": "failing"}, "data": {"swaps": 1}, "writing": {}, "the last step": {}}
    for name, settings in cases.items():
        one = copy.deepcopy(model)
        batches = share_of(rank, 4)
        if name == "data" and rank == 1:
            batches = [{"input_ids": torch.full((1, 4), 99)}]  # no such token
        progress = last_step if name == "the last step" else None
        write = no_memory if name == "writing" and rank == 1 else Undo.keep
        try:
            with patch.object(Undo, "keep", write):
                prune(one, batches, PruningConfig(**settings), progress=progress)
        except Exception as error:
            dense = all(torch.equal(a, b) for a, b in zip(one.parameters(), model.parameters(), strict=True))
            reported[name] = type(error).__name__, str(error), dense
    return reported


def pruned_together(models, ranks):
    torch.distributed.init_process_group("gloo")
    rank, llama = own_rank(), models["llama"]
    others = {
        "texts": told_apart(rank, ranks),
        "scored": scored_without_data(llama),
        "loss": watched_losses(rank),
        "first error": failing_apart(rank),
    }
    return *pruned_by_all_methods(models, rank, ranks), failures(llama, rank) | others


@pytest.fixture(scope="module")
def dense_models():
    return {name: two_blocks(name) for name in MODELS}


@pytest.fixture(scope="module")
def alone(dense_models):
    with patch.dict(SCORES):  # which it adds to
        return pruned_by_all_methods(dense_models, 0, 1)


@pytest.fixture(scope="module", params=[2, 4])
def together(request, dense_models):
    """What each rank has found."""
    return on_ranks(request.param, pruned_together, dense_models, request.param)


@pytest.mark.parametrize("model", MODELS)
def test_the_masks_and_values_are_those_of_one_process(alone, together, model):
    points = [point for point in together[0][0] if point[0] == model]
    assert {pair for pair in pairs(len(together)) if pair[0] == model} <= {*points}
    for point in points:
        check_same_as_alone(alone[0][point], *(found[point] for found, _, _ in together))


def check_same_as_alone(expected, first, *others):
    assert first["digest"] == expected["digest"]
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, atol=1e-4, rtol=1e-3)
    assert first["errors"] == pytest.approx(expected["errors"], rel=1e-2, abs=1e-6)
    for other in others:
        assert other["digest"] == first["digest"]
        assert all(torch.equal(other["weights"][name], weight) for name, weight in first["weights"].items())
        assert (other["errors"], other["notes"]) == (first["errors"], first["notes"])


def test_data_that_all_ranks_are_given_are_dealt_out(alone, together):
    passes = [found["llama", "same data"]["samples"] for found, _, _ in together]
    whole = alone[0]["llama", "same data"]["samples"]
    assert max(passes) < 0.7 * whole if len(together) == 2 else max(passes) < 0.5 * whole


def test_each_matrix_is_scored_by_one_rank(alone, together):
    scored = [count for _, count, _ in together]
    assert sum(scored) == alone[1]
    assert max(scored) < 0.75 * alone[1] if len(scored) == 2 else max(scored) < 0.6 * alone[1]


def test_a_rank_that_fails_ends_all_with_its_reason(together):
    first, second, *_ = (reported for _, _, reported in together)
    assert second["score"] == ("MemoryError", "no memory is left", True)
    assert first["score"] == ("RuntimeError", "on rank 1: MemoryError: no memory is left", True)
    assert first["data"][1].startswith("on rank 1: ")
    assert (first["data"][2], second["data"][2]) == (True, True)
    for case, own in {"writing": "MemoryError: no memory is left", "the last step": "TimeoutError: time is up"}.items():
        assert second[case] == (*own.split(": "), True)
        assert first[case] == ("RuntimeError", f"on rank 1: {own}", True)


def test_ranks_that_fail_in_different_ways_raise_one_error(together):
    assert together[1][2]["first error"] == "no memory is left"
    assert {reported["first error"] for _, _, reported in together} == {
        "no memory is left",
        "on rank 1: MemoryError: no memory is left",
    }


def test_a_loss_that_is_nan_on_one_rank_ends_all(together):
    assert {reported["loss"] for _, _, reported in together} == {"the loss of optimizer step 7 is NaN or infinite"}


def test_texts_that_ranks_have_in_common_are_dealt_out_and_their_own_are_kept(together):
    assert [reported["texts"] for _, _, reported in together] == [[8, 8 // len(together)]] * len(together)


def test_scoring_without_data_is_shared_out(together):
    scored = [reported["scored"] for _, _, reported in together]
    assert sum(scored) == 14  # matrices of two blocks
    assert max(scored) <= 14 / len(scored) + 3
