"""What calibration keeps of a layer's inputs. Statistics add up: over batches, layers that share a weight, ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class InputStatistics:
    """Squared l2 norm of each input feature over all calibration tokens, accumulated in float32.

    Attributes:
        squared_norm: (in,) float32.
        tokens: how many tokens (rows of the input matrix) were seen.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.squared_norm = torch.zeros(features, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, squared_norm: Tensor, tokens: int) -> None:
        """Add the (in,) squared norms over further tokens."""
        self.squared_norm += squared_norm
        self.tokens += tokens

    def reduce_over_ranks(self) -> None:
        """Add up what every rank of a distributed run has seen; does nothing in a single process."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        tokens = torch.tensor(self.tokens, device=self.squared_norm.device)
        dist.all_reduce(self.squared_norm)
        dist.all_reduce(tokens)
        self.tokens = int(tokens)


def squared_norms(inputs: Tensor) -> Tensor:
    """Sum over tokens of the squares of (tokens, in) inputs, in float32: (in,)."""
    return inputs.float().square().sum(dim=0)
