"""Weights in memory-mapped files: of a model that is larger than memory, only the weights in use are loaded."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_DTYPES |= {"BOOL": torch.bool}


class MappedWeights:
    """Memory-mapped tensors of safetensors files: what is written to a tensor is written to its file.

    The system reads from disk what is accessed, and caches it while there is room. `let_go` says that some tensors are
    not in use, so that their files leave the memory of the process; it loses no data, whenever it is called.

    Attributes:
        tensors: The tensors, by their names in the files.

    Args:
        files: The files. While the tensors are in use, nothing else may change them.

    >>> import tempfile
    >>> from safetensors.torch import load_file, save_file
    >>> file = Path(tempfile.mkdtemp(), "one.safetensors")
    >>> save_file({"weight": torch.ones(2, 2)}, file)
    >>> weights = MappedWeights([file])
    >>> _ = weights.tensors["weight"].fill_(3.0)
    >>> weights.flush()
    >>> load_file(file)["weight"].sum()
    tensor(12.)
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._maps: list[mmap.mmap] = []
        self._map_of: dict[int, mmap.mmap] = {}  # by the address of a tensor
        for file in files:
            self._map(file)

    def _map(self, file: Path) -> None:
        with open(file, "r+b") as opened:
            mapped = mmap.mmap(opened.fileno(), 0)
        self._maps.append(mapped)
        data = 8 + int.from_bytes(mapped[:8], "little")  # https://huggingface.co/docs/safetensors: the header's length
        header: dict[str, Any] = json.loads(mapped[8:data])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            dtype, shape, (start, stop) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if start == stop:
                self.tensors[name] = torch.empty(shape, dtype=dtype)
                continue
            flat = torch.frombuffer(mapped, dtype=dtype, count=math.prod(shape), offset=data + start)
            self.tensors[name] = flat.view(shape)
            self._map_of[flat.data_ptr()] = mapped

    def let_go(self, tensors: Iterable[Tensor]) -> None:
        """Release the memory of the files of some tensors until they are used again.

        Whole files are released, as the system reads ahead. Tensors that are not in a file are ignored.
        """
        found = (self._map_of.get(tensor.data_ptr()) for tensor in tensors)
        files = {id(mapped): mapped for mapped in found if mapped is not None}
        for mapped in files.values() if hasattr(mmap, "MADV_DONTNEED") else ():  # not on Windows, which needs no advice
            mapped.madvise(mmap.MADV_DONTNEED)

    @contextmanager
    def following(self, blocks: Iterable[nn.Module]) -> Iterator[None]:
        """Inside the context, the weights of a block are released when the model calls the next one."""
        current: nn.Module | None = None

        def enter(block: nn.Module, _: Any) -> None:
            nonlocal current
            if current is not None and current is not block:
                self.let_go(current.parameters())
            current = block

        with ExitStack() as hooks:
            for block in blocks:
                hooks.enter_context(block.register_forward_pre_hook(enter))
            yield

    def flush(self) -> None:
        """Write all changes to disk."""
        for mapped in self._maps:
            mapped.flush()
