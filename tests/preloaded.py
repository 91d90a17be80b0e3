"""Modules and files that the server of `ranks` and `commands` loads once for all processes that it forks."""

import gc

import bitsandbytes  # noqa: F401
import datasets  # noqa: F401
import lightning.pytorch.cli  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import peft  # noqa: F401
import torch._inductor.compile_fx
import torch.distributed.fsdp  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

from sparsefit.data.python_docs import documents

documents("train")  # parses the standard library
gc.freeze()  # the libraries' objects are garbage of no process
