"""Fits that prune a model which ModelParallelStrategy has sharded (FSDP2)."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy
from ranks import on_ranks
from sharded_fits import ShardsItself, sharded, whole_weights
from small_runs import Classifier, RankedData, fit, labelled
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from sparsefit.callbacks import PrunedRunCallback, WandaPruning
from sparsefit.errors import ConfigError

pytestmark = pytest.mark.slow

SETTINGS = {
    "training data": {},
    "argument": {"calibration": list(labelled(15, seed=5)), "pattern": "2:4", "micro_batch_size": 3},
    "sparsegpt": {"score": "sparsegpt", "reconstruction": "iterative"},
    "one pass": {"update": "none", "score": "ria"},
    "magnitude": {"score": "magnitude"},
}


class Sharded(ShardsItself, Classifier):
    pass


class Generating(Sharded):
    """Its predict_step calls the model again and again, which shows; calibration then takes its forward."""

    def predict_step(self, batch, batch_idx):
        x, _ = batch
        for _ in range(5):
            self(x)


class ByColumns(Classifier):
    """Splits its weights in a way that cannot be pruned in place."""

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh, shard_placement_fn=lambda p: Shard(p.ndim - 1))
        fully_shard(self.model, mesh=mesh)


class Passing(SingleDeviceStrategy):
    """Passes for a strategy of another kind, which would need GPUs, once it has set up the model."""

    def __init__(self, kind):
        super().__init__("cpu")
        self.kinds = [Passing, kind]

    def setup(self, trainer):
        super().setup(trainer)
        self.kinds.pop(0)

    @property
    def __class__(self):
        return self.kinds[0]


class StopsAtOnce(Callback):
    """Ends a fit when the model is pruned, before its first step."""

    def on_train_start(self, trainer, module):
        trainer.should_stop = True


class Dense(PrunedRunCallback):
    """Keeps the weights as they are before the pruning."""

    weights = None

    def on_pruning_start(self, trainer, module):
        self.weights = whole_weights(module)


def data_for(name):
    return RankedData() if name in ("sparsegpt", "one pass") else labelled()


def outcome(module, pruning):
    return {
        "digest": pruning.masks.digest(),
        "weights": whole_weights(module),
        "summary": {name: pruning.summary[name] for name in ("samples", "tokens", "source", "left_dense")},
    }


def fits():
    """What each of the fits comes to on one of two ranks."""
    found = {}
    for name, settings in SETTINGS.items():
        module, pruning = Sharded(), WandaPruning(**settings)
        fit(module, data_for(name), pruning, StopsAtOnce(), **sharded(2))
        found[name] = outcome(module, pruning)
        pruning.masks.verify(module)
    generating, other_pruning = Generating(), WandaPruning()
    fit(generating, labelled(), other_pruning, StopsAtOnce(), **sharded(2))
    found["generating"] = outcome(generating, other_pruning)
    result = pruning.result
    fit(module, labelled(), pruning, StopsAtOnce(), **sharded(2))
    found["pruned again"] = pruning.result is not result
    with pytest.raises(ConfigError) as refusal:
        fit(Sharded(), labelled(), WandaPruning(), max_steps=0, **sharded(2))
    found["no steps"] = str(refusal.value)
    found["failed"] = failed_on_one_rank()
    module, dense = ByColumns(), Dense()
    with pytest.raises(ConfigError) as refusal:
        fit(module, labelled(), WandaPruning(), dense, **sharded(2))
    found["refused"] = str(refusal.value), dense.weights is None
    return found


def failed_on_one_rank():
    """What the fit raises on each rank if the data of one have a row that is not finite, and what the model is then."""
    module, dense = Sharded(), Dense()
    batches = [(x.clone(), y) for x, y in labelled(16)]
    if torch.distributed.get_rank() == 1:
        batches[2][0][1, 3] = torch.nan
    with pytest.raises(Exception) as failure:  # noqa: PT011
        fit(module, labelled(), WandaPruning(calibration=batches), dense, **sharded(2))
    after = whole_weights(module)
    same = all(torch.equal(weight, after[name]) for name, weight in dense.weights.items())
    return type(failure.value).__name__, str(failure.value), same


@pytest.fixture(scope="module")
def ranks():
    return on_ranks(2, fits)


@pytest.mark.parametrize("name", [*SETTINGS, "generating"])
def test_masks_and_weights_are_those_of_a_fit_on_one_device(ranks, name):
    module, pruning = Classifier(), WandaPruning(**copy.deepcopy(SETTINGS.get(name, {})))
    fit(module, data_for(name), pruning, StopsAtOnce())
    expected = outcome(module, pruning)
    for found in (found[name] for found in ranks):
        assert found["digest"] == expected["digest"]
        assert found["summary"] == expected["summary"]
        for key, weight in expected["weights"].items():
            torch.testing.assert_close(found["weights"][key], weight, atol=1e-5, rtol=1e-5)


def test_a_second_fit_finds_the_model_pruned(ranks):
    assert [found["pruned again"] for found in ranks] == [False, False]


def test_a_fit_without_steps_says_that_nothing_was_pruned(ranks):
    for found in ranks:
        assert found["no steps"].startswith("nothing was pruned: ModelParallelStrategy restores checkpoints when a fit")


def test_data_that_fail_on_one_rank_end_the_fit_on_both_with_the_dense_model(ranks):
    (kind, others, dense), (own_kind, own, own_dense) = (found["failed"] for found in ranks)
    assert own.startswith("the inputs of model.blocks.0.up.weight are NaN or infinite in calibration batch 2")
    assert (kind, others) == (own_kind, f"on rank 1: {own}") == ("CalibrationError", f"on rank 1: {own}")
    assert (dense, own_dense) == (True, True)


def test_a_layout_that_cannot_be_pruned_is_refused_before_anything_is_done(ranks):
    for message, untouched in (found["refused"] for found in ranks):
        assert message.startswith("model.blocks.0.up.weight has the placements (Shard(dim=1),) on a mesh of (2,). ")
        assert "prune first (`sparsefit prune`, on one device)" in message
        assert untouched


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_flatten_weights_are_refused_with_the_way_out(kind):
    module = Classifier()
    dense = whole_weights(module)
    with pytest.raises(ConfigError, match=r"flattens the weights .* split the model by ModelParallelStrategy"):
        fit(module, labelled(), WandaPruning(), max_steps=1, strategy=Passing(kind), accelerator="auto")
    assert all(torch.equal(weight, dense[name]) for name, weight in whole_weights(module).items())
