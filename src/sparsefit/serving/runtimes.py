"""The runtimes in which a pruned model is measured."""

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
        name: The name for `--runtimes`.
        why_not: The reason why it cannot run a model with these masks here; empty if it can.
        prepare: Makes a decoder of a model, which it may change: callers pass a copy.
        sparse: Whether it stores weights in a sparse format. The dense twin then runs in plain torch.
        uses_zeros: Whether zeros can make it faster. If not, a gain is never reported.
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
"""The runtimes by name; plain torch is first, as the reference for dense models."""
