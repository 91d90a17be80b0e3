"""What to prune and how: the settings of one pruning run, checked on construction."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import NamedTuple

import torch

from sparsefit.errors import ConfigError
from sparsefit.pruning.scores import SCORES
from sparsefit.pruning.selection import Granularity
from sparsefit.pruning.statistics import DERIVED
from sparsefit.settings import as_number, named_settings, number

REGEX = "re:"  # the prefix of a name pattern that is a regular expression
ALLOCATIONS = {"uniform": 0, "owl": 1, "fisher": 2}  # and how many passes of the dense network each takes
CHOICES = {
    "score": SCORES,
    "update": ("block", "none"),
    "reconstruction": (None, "sequential", "iterative", "least_squares"),
    "existing_zeros": (None, "keep", "adopt", "ignore"),
}


class Pattern(NamedTuple):
    """N:M sparsity: `n` non-zeros in every `m` consecutive weights along the input dimension."""

    n: int
    m: int

    @classmethod
    def parse(cls, text: str | int) -> Pattern:
        """Read "2:4", "4:8", ...; or the integer 60 N + M, as YAML reads an unquoted 2:4 as a base-60 number.

        Raises:
            ConfigError: for anything else, or where N is not below M.

        >>> Pattern.parse("2:4"), Pattern.parse(124)
        (Pattern(n=2, m=4), Pattern(n=2, m=4))
        """
        if isinstance(text, int) and not isinstance(text, bool) and text > 60:
            text = f"{text // 60}:{text % 60}"
        match = re.fullmatch(r"(\d+):(\d+)", text) if isinstance(text, str) else None
        if match is None:
            raise ConfigError(f"pattern {text!r} is not of the form 'N:M', such as '2:4'; None is unstructured")
        n, m = int(match[1]), int(match[2])
        if not 0 < n < m:
            raise ConfigError(f"pattern '{text}' keeps {n} of every {m} weights; N must be at least 1 and below M")
        return cls(n, m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> Fraction:
        """The pattern's share of zeros, exactly."""
        return Fraction(self.m - self.n, self.m)


@named_settings
@dataclass(frozen=True)
class PruningConfig:
    """The settings of `prune`.

    Args:
        sparsity: Share of the weights of every comparison group that become zero, in [0, 1). Taken as the
            decimal it is written as: 0.57 of 300 weights are 171. None (the default) is 0.5; with a pattern, the
            pattern's own share.
        pattern: None (unstructured) or "N:M": N non-zeros of every M consecutive weights of a row.
        score: How important a weight is: "wanda", "magnitude", "wanda_l1", "wanda_linf", "sparsegpt", "ria", or one
            added with `register_score`.
        granularity: Which weights compete: "output" (each row of a matrix), "layer" (the whole matrix), "input" (each
            column), "(output, 128)" or "(input, 128)" (that many rows or columns together), or "variant" (the Wanda
            variant: each row loses its smallest scores up to the same share of its sum of scores). None is what the
            score's authors use; with allocation "fisher" the rows of a matrix compete. A pattern always compares within
            its groups of M, whatever the granularity.
        update: "block": blocks are pruned one after the other, and each one's statistics come from the outputs of the
            pruned blocks before it (the paper's order for language models). "none": all statistics come from the dense
            network (the paper's order for image classifiers).
        allocation: How the sparsity is shared out. None: every comparison group loses floor(size * sparsity), as in
            the paper. "uniform": every matrix loses the same share, rounded so that the total is exact to the weight.
            "owl": blocks with more outliers lose less. "fisher": matrices, and their rows, whose removed weights would
            change the predictions more lose less; needs logits and gradients, so one backward pass for each calibration
            sample and a model that is neither sharded nor quantized. A mapping from layer names (as in `targets`) to
            sparsities: those layers lose that share, the remaining ones what is left of the total.
        owl_threshold: M of OWL: how many times the mean score makes an outlier.
        owl_spread: Lambda of OWL: how far a block's density may lie from the mean.
        fisher_spread: How far a matrix's sparsity may lie from `sparsity` with allocation "fisher".
        swaps: Refine each mask by at most this many swaps per row of a kept and a pruned weight, each of which lowers
            the layer's error (SparseSwaps). Weights keep their values. Rows keep their number of zeros, columns do not.
        reconstruction: None (kept weights keep their values), "sequential" (the mask first, then the OBS update of the
            kept weights, column by column), "iterative" (SparseGPT's loop: masks are chosen during the update, 128
            columns at a time; for SparseGPT itself, set score "sparsegpt" as well) or "least_squares" (the values of
            the kept weights that bring the layer's outputs closest to the dense ones, solved exactly).
        damping: Share of the Gram matrix's mean diagonal that is added to the diagonal before it is inverted.
        targets: What to prune: names of layers ("q_proj", "mlp.down_proj") or of modules ("vision_tower": all in it),
            globs ("*.experts.*"), or regular expressions ("re:layers\\.[0-7]\\."). None: every layer of a known kind
            inside the repeated blocks of the model or, if it has none, all but its output layer. Routers of experts
            stay dense.
        exclude: What stays dense, named in the same ways.
        existing_zeros: What to do with zeros that the model already has. "keep": they stay zero, and more weights are
            pruned to reach the sparsity. "adopt": they are the masks; nothing is scored, and `sparsity` is ignored.
            "ignore": a zero is a weight like any other. None: as "ignore", with a note if there are many.
        micro_batch_size: Calibration samples that go through the model at once. Samples are regrouped to this
            size, so that the result does not depend on how the calibration data was batched.
        device: The device on which blocks are computed, one at a time, if not the model's own ("cuda").
        states_on_cpu: Keep the calibration samples' hidden states in CPU memory between blocks.
    """

    sparsity: float | None = None
    pattern: str | int | None = None
    score: str = "wanda"
    granularity: str | tuple[str, int] | None = None
    update: str = "block"
    allocation: str | Mapping[str, float] | None = field(default=None, hash=False)
    owl_threshold: float = 5.0
    owl_spread: float = 0.08
    fisher_spread: float = 0.2
    swaps: int = 0
    reconstruction: str | None = None
    damping: float = 0.01
    targets: Iterable[str] | str | None = None
    exclude: Iterable[str] | str = ()
    existing_zeros: str | None = None
    micro_batch_size: int = 8
    device: str | None = None
    states_on_cpu: bool = False

    def __post_init__(self) -> None:
        if self.update == "layer":
            raise ConfigError(
                "update 'layer' was removed, as it was not better than 'block' in any measurement: use update "
                "'block', or 'none', which takes one pass of the data as 'layer' did"
            )
        for name, choices in CHOICES.items():
            if getattr(self, name) not in tuple(choices):
                known = ", ".join(choice for choice in choices if choice)
                raise ConfigError(f"unknown {name} {getattr(self, name)!r}; the choices are {known}")
        _check_device(self.device)
        own = SCORES[self.score].granularity
        if self.allocation == "fisher" and own == "output" and SCORES[self.score].degree is not None:
            own = "layer"  # whose rows are scaled to be comparable
        granularity = Granularity.parse(own if self.granularity is None else self.granularity)
        pattern = None if self.pattern is None else Pattern.parse(self.pattern)
        checked = {
            "granularity": str(granularity),
            "pattern": None if pattern is None else str(pattern),
            "sparsity": _checked_sparsity(self.sparsity, pattern),
            "allocation": _checked_allocation(self.allocation),
            "targets": None if self.targets is None else _checked_names("targets", self.targets),
            "exclude": _checked_names("exclude", self.exclude),
            "micro_batch_size": number("micro_batch_size", self.micro_batch_size, least=1, whole=True),
            "swaps": number("swaps", self.swaps, least=0, whole=True),
            **{
                name: number(name, getattr(self, name), least=0)
                for name in ("damping", "owl_threshold", "owl_spread", "fisher_spread")
            },
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        self._check_combinations(granularity)

    def _check_combinations(self, granularity: Granularity) -> None:
        if self.allocation is not None and self.pattern is not None:
            raise ConfigError(f"pattern '{self.pattern}' fixes the sparsity of every layer: leave out the allocation")
        varied = granularity.axis == "variant" and self.pattern is None
        if varied and (self.allocation is not None or self.reconstruction == "iterative"):
            raise ConfigError(
                "granularity 'variant' chooses how many weights each row loses: it cannot be combined with an "
                "allocation or with reconstruction 'iterative'; use granularity 'output'"
            )
        if self.existing_zeros == "adopt" and (self.swaps or self.allocation is not None or self.reconstruction):
            raise ConfigError(
                "existing_zeros 'adopt' takes masks and weights as they are: it cannot be combined with swaps, "
                "allocation or reconstruction; use existing_zeros 'keep'"
            )
        if self.reconstruction == "iterative" and self.swaps:
            raise ConfigError(
                "swaps refine a mask before the weights change, but reconstruction 'iterative' changes them while it "
                "chooses masks: use swaps=0, or reconstruction 'sequential' or 'least_squares'"
            )

    @property
    def structure(self) -> Pattern | None:
        """The parsed pattern, or None for unstructured pruning."""
        return None if self.pattern is None else Pattern.parse(self.pattern)

    @property
    def exact_sparsity(self) -> Fraction:
        """The requested sparsity as an exact fraction."""
        return Fraction(str(self.sparsity)) if self.pattern is None else self.structure.sparsity

    @property
    def statistics(self) -> frozenset[str]:
        """The input statistics that are needed to choose the masks and new values: names from `KINDS`."""
        scored = () if self.existing_zeros == "adopt" else SCORES[self.score].needs
        needs = {DERIVED.get(need, need) for need in scored}
        return frozenset(needs | {"gram"} if self.swaps or self.reconstruction else needs)

    @property
    def needs_inputs(self) -> bool:
        """Whether calibration data is needed."""
        return bool(self.statistics) or self.passes_to_allocate > 0

    @property
    def takes_one_pass(self) -> bool:
        """Whether all statistics are collected in one pass of the dense network, as they fit in memory."""
        fits = "gram" not in self.statistics and self.device is None
        return not self.statistics or (self.update == "none" and fits)

    @property
    def takes_statistics(self) -> bool:
        """Whether statistics of the dense network are all that it needs, and neither later inputs nor gradients."""
        return self.update == "none" and self.allocation != "fisher"

    @property
    def passes_to_allocate(self) -> int:
        """How many passes of the calibration data through the dense network the allocation takes."""
        return ALLOCATIONS.get(self.allocation, 0) if isinstance(self.allocation, str) else 0


def _checked_sparsity(sparsity: object, pattern: Pattern | None) -> float:
    implied = 0.5 if pattern is None else float(pattern.sparsity)
    share = implied if sparsity is None else as_number(sparsity)
    if share is None or not 0 <= share < 1:
        raise ConfigError(f"sparsity is {sparsity!r}; it must be a number in [0, 1), the share of weights to remove")
    if pattern is not None and share != implied:
        raise ConfigError(f"sparsity {sparsity} contradicts pattern '{pattern}', which is {implied}: give one of them")
    return float(share)


def _check_device(device: object) -> None:
    try:
        is_device = device is None or torch.device(device).type != "meta"
    except (RuntimeError, TypeError):
        is_device = False
    if not is_device:
        raise ConfigError(f"device {device!r} is not a device to compute on; name one, such as 'cuda' or 'cuda:1'")


def _checked_allocation(allocation: object) -> str | dict[str, float] | None:
    if allocation is None or allocation in tuple(ALLOCATIONS):
        return allocation
    if not isinstance(allocation, Mapping) or not allocation:
        raise ConfigError(
            f"unknown allocation {allocation!r}; the choices are {', '.join(ALLOCATIONS)}, a mapping such as "
            "{'down_proj': 0.4}, or None"
        )
    shares = {name: as_number(share) for name, share in allocation.items()}
    wrong = [name for name, share in shares.items() if not isinstance(name, str) or share is None or not 0 <= share < 1]
    if wrong:
        given = {name: allocation[name] for name in wrong}
        raise ConfigError(f"allocation gives {given}; every layer name needs a sparsity in [0, 1)")
    return {_checked_pattern("allocation", name): float(share) for name, share in shares.items()}


def _checked_names(field: str, names: object) -> tuple[str, ...]:
    if isinstance(names, str):
        names = (names,)
    if isinstance(names, Mapping) or not isinstance(names, Iterable):
        names = (None,)
    # A set has no fixed order: sort it, so that all processes agree.
    names = sorted(names, key=str) if isinstance(names, Set) else list(names)
    if not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{field} must be a list of layer names, such as ['q_proj', 'v_proj']; it is {names!r}")
    if field == "targets" and not names:
        raise ConfigError("targets is empty: nothing would be pruned; leave it out to prune every layer")
    return tuple(_checked_pattern(field, name) for name in names)


def _checked_pattern(field: str, name: str) -> str:
    if name.startswith(REGEX):
        try:
            re.compile(name.removeprefix(REGEX))
        except re.error as error:
            raise ConfigError(f"{field}: {name!r} is no regular expression: {error}") from error
    return name


def layer_name(weight_name: str) -> str:
    """The name of a weight as configurations write it: without ".weight" and without an expert's number.

    >>> layer_name("0.fc.weight"), layer_name("0.experts.down_proj[3]")
    ('0.fc', '0.experts.down_proj')
    """
    return re.sub(r"\[\d+\]$", "", weight_name).removesuffix(".weight")


def matches(name: str, patterns: Iterable[str]) -> bool:
    r"""Whether a layer's name matches one of the patterns: consecutive parts of a name, which match a layer ("q_proj",
    "mlp.down_proj") or everything in a module ("vision_tower", "layers.0"); a glob ("*.experts.*", "layers.[0-3].*");
    or, after "re:", a regular expression that is searched for in the name.

    >>> matches("model.layers.0.q_proj", ["q_proj"]), matches("model.layers.0.q_proj", ["proj"])
    (True, False)
    >>> [matches("model.vision.layers.0.fc1", [pattern]) for pattern in ("vision", "layers.*.fc?", r"re:\.fc\d$")]
    [True, True, True]
    """
    return any(_matches(name, pattern) for pattern in patterns)


def _matches(name: str, pattern: str) -> bool:
    if pattern.startswith(REGEX):
        return re.search(pattern.removeprefix(REGEX), name) is not None
    if set(pattern) & set("*?["):
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
    return f".{pattern}." in f".{name}."
