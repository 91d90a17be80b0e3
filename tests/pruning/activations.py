"""Activations like those of real models, their Gram matrices, and comparisons of results."""

from __future__ import annotations

import numpy as np
import torch

DAMPING = 0.01


def real_like_inputs(inputs: int, tokens: int = 400, rank: int = 8, noise: float = 0.3, seed: int = 0) -> np.ndarray:
    """(tokens, inputs) activations: a few strong directions, noise, and very different scales."""
    random = np.random.default_rng(seed)
    shared = random.normal(size=(tokens, rank)) @ random.normal(size=(rank, inputs))
    scales = np.exp(random.normal(size=inputs))
    return (shared + noise * random.normal(size=(tokens, inputs))) * scales


def gram_of(tokens: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(tokens.T @ tokens).float()


def layer(outputs: int, inputs: int, dtype=torch.float32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and a random mask whose rows keep different numbers of weights."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    return weight, torch.rand(outputs, inputs, generator=generator) < torch.linspace(0.2, 0.9, outputs)[:, None]


def damped(gram: torch.Tensor, damping: float = DAMPING) -> np.ndarray:
    system = gram.double().numpy()
    return system + damping * np.diag(system).mean() * np.eye(len(system))


def assert_close(found: torch.Tensor, expected: np.ndarray, tolerance: float = 1e-4):
    assert np.abs(found.double().numpy() - expected).max() <= tolerance * np.abs(expected).max()
