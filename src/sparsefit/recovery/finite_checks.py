"""Training that diverges: losses, gradients and weights that are NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from sparsefit.bare_model import canonical_name
from sparsefit.errors import DivergenceError
from sparsefit.pruning.statistics import all_finite
from sparsefit.ranks import add_up
from sparsefit.sharded import is_sharded, shard_of

LOWEST_SCALE = 1e-4
"""Of a gradient scaler, which begins at 65,536: gradients that are finite only below this need more than 16 bits."""


def nonfinite_count(values: Tensor) -> int:
    """How many numbers of a tensor are NaN or infinite; 0 for one of whole numbers or packed bits."""
    if not _can_diverge(values):
        return 0
    own = shard_of(values)
    if not is_sharded(values) and all_finite(own):
        return 0
    return int(_agreed((~own.isfinite()).sum(), [values]))


def nonfinite_weights(model: nn.Module, trained_only: bool = False) -> dict[str, int]:
    """How many weights are NaN or infinite, by the names of the parameters that have any.

    Args:
        model: Its parameters are looked at; buffers may hold an infinity on purpose, as attention masks do.
        trained_only: Look only at parameters that require a gradient.
    """
    own = dict(model.named_parameters())
    looked_at = {name: p.detach() for name, p in own.items() if p.requires_grad or not trained_only}
    # All are asked at once, so that a GPU is waited for once. Only if something is wrong is it looked for.
    if bool(_agreed(_spoilt(looked_at.values()), looked_at.values()).isfinite()):
        return {}
    counts = {canonical_name(name): nonfinite_count(tensor) for name, tensor in looked_at.items()}
    return {name: count for name, count in counts.items() if count}


def check_finite_weights(model: nn.Module, what: str = "the model") -> None:
    """See that no weight is NaN or infinite, before they are written.

    Args:
        model: A model or LightningModule.
        what: What would be written, as the error names it.

    Raises:
        DivergenceError: naming parameters, and how many of their weights are.
    """
    if broken := nonfinite_weights(model):
        raise DivergenceError(f"{what} is not written: {told(broken)}")


def told(broken: Mapping[str, int]) -> str:
    """What `nonfinite_weights` found, in words."""
    listed = ", ".join(f"{name} ({count:,})" for name, count in list(broken.items())[:3])
    more = ", ..." if len(broken) > 3 else ""
    return f"{sum(broken.values()):,} of its weights are NaN or infinite, in {listed}{more}"


class FiniteWatch:
    """Looks at the losses and gradients of each optimizer step, and never waits for a GPU to do so.

    A CPU tells at once, so that nothing has changed when `check` raises. What a GPU found is read when the next step
    asks: by then it is there.
    """

    def __init__(self) -> None:
        self._losses: Tensor | None = None  # the sum of those of one step, times 0: NaN if any is not finite
        self._asked: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def add_loss(self, loss: Tensor) -> None:
        """Take in a loss of the step to come."""
        bad = (loss.detach() * 0).sum().float()
        self._losses = bad if self._losses is None else self._losses.to(bad.device) + bad

    def check(self, step: int, gradients: Iterable[Tensor]) -> None:
        """Look at the losses and gradients of a step that is about to be taken.

        Args:
            step: Its number, for the error.
            gradients: Of what the optimizer changes; none where a gradient scaler looks at them.

        Raises:
            DivergenceError: if they, or on a GPU those of the step before, are not finite.
        """
        gradients = [*gradients]
        spoilt = _spoilt(gradients)
        losses = torch.zeros(()) if self._losses is None else self._losses
        self._losses = None
        found = _agreed(torch.stack([losses.to(spoilt.device), spoilt]), gradients).isfinite()  # (2,)
        self.settle()
        if found.device.type == "cuda":
            found, event = found.to("cpu", non_blocking=True), torch.cuda.Event()
            event.record()
            self._asked = step, found, event
        else:
            self._asked = step, found, None
            self.settle()

    def settle(self) -> None:
        """Read what the last `check` found.

        Raises:
            DivergenceError: if that was not finite.
        """
        if self._asked is None:
            return
        (step, found, event), self._asked = self._asked, None
        if event is not None:
            event.synchronize()
        loss, gradient = found.tolist()
        if not (loss and gradient):
            what = "gradient" if loss else "loss"
            raise DivergenceError(f"the {what} of optimizer step {step} is NaN or infinite")


def check_scaler(scaler: torch.amp.GradScaler, began: tuple[int, float], step: int, ended: bool = False) -> None:
    """See that a gradient scaler lets steps be taken. A GPU is waited for.

    Args:
        scaler: It leaves out steps whose gradients are not finite, and lowers its scale with each.
        began: Optimizer steps at an earlier moment of the run, and the scale then.
        step: Optimizer steps now; those that were left out count.
        ended: Whether no step follows, in which it might find its scale.

    Raises:
        DivergenceError: if its scale has fallen too far, or a run has ended in which all steps were left out.
    """
    scale, taken = scaler.get_scale(), step - began[0]
    all_left_out = taken > 0 and scale < began[1] * scaler.get_backoff_factor() ** (taken - 0.5)
    if scale < LOWEST_SCALE or (ended and all_left_out):
        raise DivergenceError(
            f"the gradient scaler of 16-bit training has left out {'all' if all_left_out else 'most'} of {taken} "
            f"optimizer steps, as their gradients are NaN or infinite in 16 bits at whatever scale (now {scale:.1e}), "
            "so the weights stay as they were"
        )


def gradients_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The gradients that an optimizer is about to use, the values alone of sparse ones."""
    found = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return [grad._values() if grad.is_sparse else grad for grad in found]


def _spoilt(tensors: Iterable[Tensor]) -> Tensor:
    """0, (), where the first of them is; NaN if any number is NaN or infinite. No copy is made of them; of those that
    are split over devices the part that is here is looked at."""
    floats = [shard_of(tensor) for tensor in tensors if _can_diverge(tensor)]
    if not any(map(Tensor.numel, floats)):
        return floats[0].new_zeros((), dtype=torch.float32) if floats else torch.zeros(())
    return nn.utils.get_total_norm([own for own in floats if own.numel()], norm_type=math.inf).float() * 0


def _agreed(found: Tensor, tensors: Iterable[Tensor]) -> Tensor:
    """What was found in tensors, added up over the ranks where these are split over devices: NaN, if one found it."""
    if any(map(is_sharded, tensors)):
        add_up(found)
    return found


def _can_diverge(tensor: Tensor) -> bool:
    """Whether it has numbers to look at: torch computes with floats of 8 bits nowhere, so nothing trains them."""
    return tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel() > 0
