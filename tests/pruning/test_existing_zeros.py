"""Models that are sparse already, layers whose inputs say nothing, and the variant where it cannot come near."""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from sparsefit import PruningConfig, prune
from sparsefit.errors import ConfigError
from sparsefit.pruning.selection import Granularity, select

METHODS = {
    "wanda": {},
    "per layer": {"granularity": "layer"},
    "per input": {"granularity": "input"},
    "2:4": {"pattern": "2:4"},
    "ria": {"score": "ria"},
    "magnitude": {"score": "magnitude"},
    "swaps": {"swaps": 8},
    "swaps 2:4": {"swaps": 8, "pattern": "2:4"},
    "sequential": {"reconstruction": "sequential"},
    "least squares": {"reconstruction": "least_squares"},
    "sparsegpt": {"score": "sparsegpt", "reconstruction": "iterative"},
    "sparsegpt 2:4": {"score": "sparsegpt", "reconstruction": "iterative", "pattern": "2:4"},
    "uniform": {"allocation": "uniform"},
    "convolution": {"granularity": "layer"},
}


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.2, 2.0, shape[1]).reshape(
        -1, *(1,) * (len(shape) - 2)
    )


def network(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if kind == "convolution":
        layers = [nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)]
        return nn.Sequential(*layers), inputs(6, 8, 9, 9)
    layers = [nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)]
    return nn.Sequential(*layers), inputs(200, 32)


def sparse_network(kind: str, share: float) -> tuple[nn.Module, Tensor]:
    """A network of which that share of the weights is zero at random, the head among them."""
    model, data = network(kind)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= torch.rand(parameter.shape, generator=generator) >= share
    return model, data


@pytest.mark.parametrize("method", METHODS)
def test_zeros_are_kept_and_pruning_continues_to_the_requested_total(method):
    model, data = sparse_network(method, 0.2)
    zeros = {name: p == 0 for name, p in model.named_parameters() if p.ndim > 1}
    result = prune(model, [data], PruningConfig(existing_zeros="keep", **METHODS[method]))
    for name in result.masks:
        weight = model.get_parameter(name).detach()
        assert (weight[zeros[name]] == 0).all()
        assert not result.masks[name][zeros[name].flatten(1)].any()
        assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.02 if "2:4" in method else 1e-9)
    assert result.masks.sparsity == pytest.approx(0.5, abs=0.02 if "2:4" in method else 1e-9)
    assert not [note for note in result.notes if "existing_zeros" in note]


def test_without_zeros_keep_changes_no_mask():
    model, data = network("wanda")
    for settings in METHODS.values():
        masks = [
            prune(copy.deepcopy(model), [data], PruningConfig(existing_zeros=zeros, **settings)).masks.digest()
            for zeros in ("keep", "ignore")
        ]
        assert masks[0] == masks[1], settings


def test_more_zeros_than_requested_all_stay_and_are_reported():
    model, data = sparse_network("wanda", 0.7)
    zeros = {name: p == 0 for name, p in model.named_parameters() if p.ndim > 1}
    result = prune(model, [data], PruningConfig(existing_zeros="keep"))
    assert all(not result.masks[name][zeros[name]].any() for name in result.masks)
    assert result.masks.sparsity > 0.65
    assert any("more zeros than were asked for" in note for note in result.notes)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_adopted_masks_are_the_zeros_that_the_model_has(kind):
    model, _ = sparse_network(kind, 0.7)
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = prune(model, None, PruningConfig(existing_zeros="adopt"))
    assert result.masks
    for name in result.masks:
        assert torch.equal(result.masks[name], (dense[name] != 0).flatten(1))
        assert torch.equal(model.get_parameter(name), dense[name])
    result.masks.verify(model)


def test_adopting_needs_zeros_that_fit():
    model, data = network("wanda")
    with pytest.raises(ConfigError, match="no zeros to adopt"):
        prune(model, None, PruningConfig(existing_zeros="adopt"))
    prune(model, [data], PruningConfig(pattern="2:4"))
    assert prune(model, None, PruningConfig(existing_zeros="adopt", pattern="2:4")).masks.sparsity == 0.5
    with pytest.raises(ConfigError, match=r"zeros of .*weight do not fit the pattern '1:4'"):
        prune(model, None, PruningConfig(existing_zeros="adopt", pattern="1:4"))


@pytest.mark.parametrize(
    "settings", [{"swaps": 2}, {"allocation": "uniform"}, {"reconstruction": "least_squares"}], ids=str
)
def test_adopted_masks_are_not_chosen_anew(settings):
    with pytest.raises(ConfigError, match="'adopt' takes masks and weights as they are"):
        PruningConfig(existing_zeros="adopt", **settings)


@pytest.mark.parametrize(
    ("share", "existing", "reported"), [(0.3, None, True), (0.02, None, False), (0.3, "ignore", False)]
)
def test_many_zeros_are_reported_if_existing_zeros_is_not_set(share, existing, reported):
    model, data = sparse_network("wanda", share)
    notes = prune(model, [data], PruningConfig(existing_zeros=existing)).notes
    assert any("zeros already" in note and "'keep'" in note and "'adopt'" in note for note in notes) == reported


class Dead(nn.Module):
    """A network whose second layer gets nothing but zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.dead, self.top = nn.Linear(32, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.top(hidden + self.dead(hidden.clamp(min=0, max=0)))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "convolution"])
def test_a_layer_that_gets_zeros_alone_is_pruned_by_magnitude_with_a_note(method):
    torch.manual_seed(0)
    model, data = Dead(), inputs(50, 32)
    dense = model.dead.weight.detach().clone()
    settings = METHODS[method]
    result = prune(model, [data], PruningConfig(**settings))
    kept = result.masks["dead.weight"]
    by_magnitude = PruningConfig(
        score="magnitude", granularity=result.config.granularity, pattern=settings.get("pattern")
    )
    other = Dead()
    other.dead.weight.data = dense.clone()
    if method not in ("uniform", "magnitude"):
        assert torch.equal(kept, prune(other, [data], by_magnitude).masks["dead.weight"])
    assert torch.equal(model.dead.weight, torch.where(kept, dense, 0))
    assert float((~kept).float().mean()) == 0.5
    assert any("dead.weight" in note and "magnitude" in note for note in result.notes) == (method != "magnitude")


@pytest.mark.parametrize("sparsity", [Fraction(1, 2), Fraction(9, 10), Fraction(99, 100)])
@pytest.mark.parametrize("form", ["zeros", "one large", "equal", "few"])
def test_the_variant_never_empties_a_matrix_and_removes_what_is_asked(form, sparsity):
    scores = {
        "zeros": torch.zeros(20, 50),
        "one large": torch.full((20, 50), 1e-6).index_fill_(1, torch.tensor([3]), 1e3),
        "equal": torch.ones(20, 50),
        "few": torch.tensor([[5.0, 1.0, 1.0, 1.0]] * 25),
    }[form]
    kept = select(scores, Granularity("variant"), sparsity)
    assert kept.any()
    assert float((~kept).float().mean()) == pytest.approx(float(sparsity), abs=0.001 + 1e-9)
