"""Checks for diverged training: losses, gradients and weights that are NaN or infinite."""

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
"""Lowest accepted scale of a gradient scaler, which starts at 65,536. Gradients that are finite only at a lower scale
need more than 16 bits."""


def nonfinite_count(values: Tensor) -> int:
    """The number of NaN and infinite elements of a tensor; 0 for integer tensors and packed bits."""
    if not _can_diverge(values):
        return 0
    own = shard_of(values)
    if not is_sharded(values) and all_finite(own):
        return 0
    return int(_sum_over_ranks((~own.isfinite()).sum(), [values]))


def nonfinite_weights(model: nn.Module, trained_only: bool = False) -> dict[str, int]:
    """The number of NaN and infinite weights, by name of the parameters that have any.

    Args:
        model: Its parameters are checked. Buffers are not, as attention masks hold infinities on purpose.
        trained_only: Check only parameters that require a gradient.
    """
    own = dict(model.named_parameters())
    checked = {name: p.detach() for name, p in own.items() if p.requires_grad or not trained_only}
    # One check of all tensors waits for a GPU only once. Tensors are counted one by one only if it fails.
    if bool(_sum_over_ranks(_zero_or_nan(checked.values()), checked.values()).isfinite()):
        return {}
    counts = {canonical_name(name): nonfinite_count(tensor) for name, tensor in checked.items()}
    return {name: count for name, count in counts.items() if count}


def check_finite_weights(model: nn.Module, what: str = "the model") -> None:
    """Check that no weight is NaN or infinite before weights are written.

    Args:
        model: A model or LightningModule.
        what: What would be written, for the error message.

    Raises:
        DivergenceError: names the parameters and how many of their weights are not finite.
    """
    if broken := nonfinite_weights(model):
        raise DivergenceError(f"{what} is not written: {nonfinite_message(broken)}")


def nonfinite_message(broken: Mapping[str, int]) -> str:
    """A message for the result of `nonfinite_weights`."""
    listed = ", ".join(f"{name} ({count:,})" for name, count in list(broken.items())[:3])
    more = ", ..." if len(broken) > 3 else ""
    return f"{sum(broken.values()):,} of its weights are NaN or infinite, in {listed}{more}"


class FiniteWatch:
    """Checks the losses and gradients of each optimizer step without waiting for a GPU.

    On a CPU, `check` raises at once, before the step changes any weight. On a GPU, the result of a check is read in the
    next call of `check`, when it is ready.
    """

    def __init__(self) -> None:
        self._losses: Tensor | None = None  # sum of the losses of a step, times 0: NaN if any is not finite
        self._pending: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def add_loss(self, loss: Tensor) -> None:
        """Add a loss of the next step."""
        bad = (loss.detach() * 0).sum().float()
        self._losses = bad if self._losses is None else self._losses.to(bad.device) + bad

    def check(self, step: int, gradients: Iterable[Tensor]) -> None:
        """Check the losses and gradients of a step before it is taken.

        Args:
            step: The number of the step, for the error message.
            gradients: The gradients that the optimizer will use; none if a gradient scaler checks them.

        Raises:
            DivergenceError: if they, or on a GPU those of the step before, are not finite.
        """
        gradients, losses = [*gradients], self._losses
        self._losses = None
        if losses is None and not gradients:
            self.settle()
            return
        if gradients:
            flag = _zero_or_nan(gradients)
            found = torch.stack([torch.zeros_like(flag) if losses is None else losses.to(flag.device), flag])
            found = _sum_over_ranks(found, gradients)  # gradients that are not sharded hold the NaN of any rank
        else:
            found = torch.stack([losses, torch.zeros_like(losses)])
            add_up(found)
        found = found.isfinite()  # (2,): the losses, the gradients
        self.settle()
        if found.device.type == "cuda":
            found, event = found.to("cpu", non_blocking=True), torch.cuda.Event()
            event.record()
            self._pending = step, found, event
        else:
            self._pending = step, found, None
            self.settle()

    def settle(self) -> None:
        """Read the result of the last `check`.

        Raises:
            DivergenceError: if a loss or gradient was not finite.
        """
        if self._pending is None:
            return
        (step, found, event), self._pending = self._pending, None
        if event is not None:
            event.synchronize()
        loss, gradient = found.tolist()
        if not (loss and gradient):
            what = "gradient" if loss else "loss"
            raise DivergenceError(f"the {what} of optimizer step {step} is NaN or infinite")


def check_scaler(scaler: torch.amp.GradScaler, began: tuple[int, float], step: int, ended: bool = False) -> None:
    """Check that a gradient scaler does not skip all steps. Waits for the GPU.

    Args:
        scaler: It skips steps whose gradients are not finite, and lowers its scale each time.
        began: Optimizer steps and scale at an earlier moment of the run.
        step: Optimizer steps now, including skipped ones.
        ended: Whether training has ended, so that no later step can find a working scale.

    Raises:
        DivergenceError: if the scale is too low, or training has ended with all steps skipped.
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
    """The gradients that an optimizer is about to use; for sparse gradients their values."""
    found = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return [grad._values() if grad.is_sparse else grad for grad in found]


def _zero_or_nan(tensors: Iterable[Tensor]) -> Tensor:
    """A scalar on the device of the first tensor: NaN if any element is NaN or infinite, else 0. Tensors are not
    copied; of sharded ones the shard of this rank is checked."""
    floats = [shard_of(tensor) for tensor in tensors if _can_diverge(tensor)]
    if not any(map(Tensor.numel, floats)):
        return floats[0].new_zeros((), dtype=torch.float32) if floats else torch.zeros(())
    return nn.utils.get_total_norm([own for own in floats if own.numel()], norm_type=math.inf).float() * 0


def _sum_over_ranks(found: Tensor, tensors: Iterable[Tensor]) -> Tensor:
    """Sum a result over ranks, in place, if any of the tensors is sharded; NaN on one rank makes the sum NaN."""
    if any(map(is_sharded, tensors)):
        add_up(found)
    return found


def _can_diverge(tensor: Tensor) -> bool:
    """Whether a tensor needs a check: non-empty floats, without 8-bit floats, which torch does not train."""
    return tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel() > 0
