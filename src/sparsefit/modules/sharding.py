"""Sharding a model over devices with FSDP2, as Lightning's ModelParallelStrategy requires of its modules."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from torch import nn

from sparsefit.errors import ConfigError
from sparsefit.pruning.blocks import find_block_lists
from sparsefit.recovery.gather_shards import has_shards
from sparsefit.sharded import is_sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the parameters of a model over devices: each repeated block is one FSDP unit, the rest another.

    A custom module calls this for its network:

    ```python
    def configure_model(self):
        if self.device_mesh is not None:
            shard(self.net, self.device_mesh)
    ```

    Each parameter keeps its dtype and is gathered in it, so that the model computes what it would on one device; mixed
    precision is left to autocast. Between passes all parameters are resharded, including those outside blocks, so that
    changes of the shards take effect in the next pass.

    Args:
        model: The network that the module calls in its steps; each process has all of it. Calling this again changes
            nothing.
        mesh: A LightningModule's `device_mesh`.

    Raises:
        ConfigError: if the mesh splits matrices (tensor parallelism), or the trained parameters of a block have
            several dtypes and cannot be put in separate units.
    """
    from torch.distributed.fsdp import fully_shard

    if mesh["tensor_parallel"].size() > 1:
        raise ConfigError(
            "the devices are to hold parts of products (tensor_parallel_size), which this module does not do: take "
            f"ModelParallelStrategy(data_parallel_size={mesh.size()}, tensor_parallel_size=1)"
        )
    if has_shards(model):
        return
    blocks = [block for blocks in find_block_lists(model) for block in blocks]
    for unit in (*blocks, model):
        for part in (*_of_other_dtype(unit), unit):
            fully_shard(part, mesh=mesh["data_parallel"], reshard_after_forward=True)


def _of_other_dtype(unit: nn.Module) -> list[nn.Module]:
    """The modules in a unit whose trained parameters have another dtype than its adapters or, without adapters, than
    most trained parameters. They become separate units, as FSDP2 reduces the gradients of a unit in one tensor."""
    trained = [
        (part, name, parameter)
        for part in unit.modules()
        for name, parameter in part.named_parameters(recurse=False)
        if parameter.requires_grad and not is_sharded(parameter)
    ]
    # An adapter reads the parameters of its base layer directly; a separate unit would not be gathered then.
    adapters = {id(part) for layer in unit.modules() if hasattr(layer, "base_layer") for part in layer.modules()}
    dtypes = Counter(parameter.dtype for part, _, parameter in trained if id(part) in adapters)
    dtypes = dtypes or Counter(parameter.dtype for *_, parameter in trained)
    if not dtypes:
        return []
    [(usual, _), *_] = dtypes.most_common()
    others = {part: name for part, name, parameter in trained if parameter.dtype != usual}
    for part, name in others.items():
        if part is unit or id(part) in adapters or any(True for _ in part.children()):
            raise ConfigError(
                f"a {type(part).__name__} of the model trains its {name} in {getattr(part, name).dtype}, and other "
                f"parameters of its block in {usual}, which FSDP2 cannot shard together: train in one dtype (dtype: "
                "float32), or leave this out of what is trained (train_biases, modules_to_save)"
            )
    return list(others)
