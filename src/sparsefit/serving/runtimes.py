"""The runtimes that a pruned model is tried in, each with the reason where it cannot run here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from sparsefit.pruning import MaskSet
from sparsefit.serving import onnx_runtime, openvino_runtime, plain_torch, torch_csr, torch_two_of_four
from sparsefit.serving.decoders import Decoder


@dataclass(frozen=True)
class Runtime:
    """One way to run a language model.

    Attributes:
        name: What it is called.
        why_not: Why it cannot run a model with these masks here; the empty string if it can.
        prepare: A decoder of a model, which it may change: it is given a copy.
        sparse: Whether it holds weights in a sparse format; the dense twin then runs as plain torch has it.
        uses_zeros: Whether it can do anything with zeros; one that cannot is never said to gain by them.
    """

    name: str
    why_not: Callable[[nn.Module, MaskSet], str]
    prepare: Callable[[nn.Module, MaskSet], Decoder]
    sparse: bool
    uses_zeros: bool = True


RUNTIMES = {
    runtime.name: runtime
    for runtime in (
        Runtime(plain_torch.NAME, plain_torch.why_not, plain_torch.prepare, False, False),
        Runtime(torch_csr.NAME, torch_csr.why_not, torch_csr.prepare, True),
        Runtime(torch_two_of_four.NAME, torch_two_of_four.why_not, torch_two_of_four.prepare, True),
        Runtime(openvino_runtime.NAME, openvino_runtime.why_not, openvino_runtime.prepare, False),
        Runtime(onnx_runtime.NAME, onnx_runtime.why_not, onnx_runtime.prepare, False, False),
    )
}
"""By name, plain torch first: what is dense is held against it."""
