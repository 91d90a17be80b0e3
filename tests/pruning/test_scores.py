"""Each score against numpy, and scores of one's own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from reference import SCORES as REFERENCE
from reference import assert_mask, damped_inverse, gram_of, score_of
from reference_inputs import collect
from torch import Tensor, nn

from sparsefit.errors import CalibrationError, ConfigError
from sparsefit.pruning import PruningConfig, prune, register_score
from sparsefit.pruning.scores import SCORES, computed

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight_and_inputs(dtype: torch.dtype, zero_row: bool = False, zero_column: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(13, 9, generator=generator)
    inputs = torch.randn(40, 9, generator=generator) * torch.linspace(0.1, 4, 9)
    if zero_row:
        weight[4] = 0
    if zero_column:
        weight[:, 6] = 0
        inputs[:, 6] = 0
    return weight.to(dtype), inputs


def statistics(inputs: Tensor) -> dict[str, Tensor]:
    inverse = damped_inverse(gram_of([inputs]) + np.diag((inputs == 0).all(0).double().numpy()))
    return {
        "squared_norm": inputs.square().sum(0),
        "abs_sum": inputs.abs().sum(0),
        "abs_max": inputs.abs().amax(0),
        "gram": inputs.T @ inputs,
        "inverse_diagonal": torch.from_numpy(inverse.diagonal().copy()).float(),
    }


@pytest.fixture
def own_scores() -> Iterator[None]:
    """Scores may be registered; afterwards there are none but those of before."""
    before = dict(SCORES)
    yield
    SCORES.clear()
    SCORES.update(before)


@pytest.mark.parametrize("zeros", [{}, {"zero_row": True}, {"zero_column": True}], ids=["full", "row", "column"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCORES)
def test_scores_equal_numpy(name: str, dtype: torch.dtype, zeros: dict):
    weight, inputs = weight_and_inputs(dtype, **zeros)
    before, given = weight.clone(), statistics(inputs)
    scores = computed(SCORES[name].function(weight, *(given[need] for need in SCORES[name].needs)))
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert torch.equal(weight, before)
    if name == "sparsegpt":  # of a dead input no inverse is defined; its weights are those of zeros here
        expected = weight.double().numpy() ** 2 / given["inverse_diagonal"].double().numpy()
    else:
        expected, _ = score_of(name, weight, [inputs])
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-5, atol=0)
    for row, column in [(4, None)] * ("zero_row" in zeros) + [(None, 6)] * ("zero_column" in zeros):
        assert (scores[row] if column is None else scores[:, column]).eq(0).all()


def test_every_score_has_a_reference_and_the_granularity_of_its_authors():
    assert SCORES.keys() == REFERENCE.keys()
    assert {name: PruningConfig(score=name).granularity for name in SCORES} == {
        "wanda": "output",
        "magnitude": "layer",
        "wanda_l1": "output",
        "wanda_linf": "output",
        "sparsegpt": "(input, 128)",
        "ria": "output",
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_large_half_precision_values_do_not_overflow(dtype: torch.dtype):
    weight, inputs = torch.full((3, 4), 6e4, dtype=dtype), torch.full((5, 4), 300.0)
    for name, score in SCORES.items():
        scores = computed(score.function(weight, *(statistics(inputs)[need] for need in score.needs)))
        assert scores.isfinite().all(), name


def test_the_exponent_of_ria():
    weight, inputs = weight_and_inputs(torch.float32)
    norm = inputs.square().sum(0)
    assert (
        SCORES["ria"]
        .function(weight, norm, 0.0)
        .allclose(weight.abs() / weight.abs().sum(0) + weight.abs() / weight.abs().sum(1, keepdim=True))
    )
    ratio = SCORES["ria"].function(weight, norm, 1.0) / SCORES["ria"].function(weight, norm, 0.0)
    torch.testing.assert_close(ratio, norm.sqrt().expand(13, 9))


# Scores of one's own


def layer_and_data() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 6)).eval(), [torch.randn(1, 12, 10) * torch.linspace(0.1, 3, 10)]


OWN = {
    "nothing": ((), lambda w: w.float().square(), lambda w, x: w**2),
    "squared_norm": (("squared_norm",), lambda w, n: w.square() * n, lambda w, x: w**2 * (x**2).sum(0)),
    "a single name": ("abs_max", lambda w, m: w.abs() + m, lambda w, x: np.abs(w) + np.abs(x).max(0)),
    "gram": (("gram",), lambda w, g: (w * (w @ g)).abs(), lambda w, x: np.abs(w * (w @ (x.T @ x)))),
    "two": (
        ("abs_sum", "inverse_diagonal"),
        lambda w, s, i: w.abs() * s / i,
        lambda w, x: np.abs(w) * np.abs(x).sum(0) / damped_inverse(x.T @ x).diagonal(),
    ),
}


@pytest.mark.usefixtures("own_scores")
@pytest.mark.parametrize("granularity", [None, "layer", ("input", 4)])
@pytest.mark.parametrize("case", OWN)
def test_a_score_of_ones_own(case: str, granularity: str | tuple[str, int] | None):
    needs, function, reference = OWN[case]
    register_score("own", function, needs, granularity="input")
    model, data = layer_and_data()
    weight = model[0].weight.detach().double().numpy()
    scores = reference(weight, collect(model, data)["0.weight"][0].double().numpy())
    config = PruningConfig(score="own", granularity=granularity, sparsity=0.4)
    result = prune(model, data if needs else None, config)
    axis, size = granularity if isinstance(granularity, tuple) else (granularity or "input", 1)
    assert_mask(result.masks["0.weight"], scores, 1e-4, sparsity=0.4, granularity=axis, size=size)
    assert bool(result.layer_errors) == (case in ("gram", "two"))


@pytest.mark.usefixtures("own_scores")
@pytest.mark.parametrize(
    ("name", "needs", "cause"),
    [
        ("own", ("squared_norm", "variance"), r"'own' needs \['variance'\]; the statistics are squared_norm, abs_sum"),
        ("own", "norm", r"\['norm'\]"),
        ("wanda", ("squared_norm",), "a score 'wanda' already"),
    ],
)
def test_scores_that_cannot_be_registered(name: str, needs: tuple[str, ...] | str, cause: str):
    before = dict(SCORES)
    with pytest.raises(ConfigError, match=cause):
        register_score(name, lambda weight, *given: weight.abs(), needs)
    assert before == SCORES


@pytest.mark.usefixtures("own_scores")
def test_a_score_may_be_registered_again_but_its_name_not_be_taken():
    def own(weight: Tensor) -> Tensor:
        return weight.abs()

    register_score("own", own, ())
    register_score("own", own, (), granularity="layer")
    assert PruningConfig(score="own").granularity == "layer"
    with pytest.raises(ConfigError, match="another name"):
        register_score("own", lambda weight: weight, ())
    with pytest.raises(ConfigError, match=r"unknown score 'owner'; the choices are wanda, .*, own"):
        PruningConfig(score="owner")


@pytest.mark.usefixtures("own_scores")
def test_scores_that_are_not_finite_leave_the_model_dense():
    register_score("own", lambda weight: weight / 0, ())
    model, _ = layer_and_data()
    before = model[0].weight.detach().clone()
    with pytest.raises(CalibrationError, match=r"scores of 0\.weight are not finite"):
        prune(model, config=PruningConfig(score="own"))
    assert torch.equal(model[0].weight, before)
