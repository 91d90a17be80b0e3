"""Splitting a model over devices by FSDP2, as Lightning's ModelParallelStrategy asks its modules to."""

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
    """Split the parameters of a model over devices: each repeated block by itself, and the rest together.

    A module of one's own does this for its network:

    ```python
    def configure_model(self):
        if self.device_mesh is not None:
            shard(self.net, self.device_mesh)
    ```

    Each parameter stays in the dtype it has, in which it is gathered, too, so that a model computes what it would on
    one device; in mixed precision that is autocast's affair. All of a device's parameters are split whenever no pass is
    under way, those outside blocks, too: what writes to the parts is then seen by the next pass.

    Args:
        model: What the module calls in its steps; each process has all of it. A second time changes nothing.
        mesh: A LightningModule's `device_mesh`.

    Raises:
        ConfigError: if the mesh splits matrices (tensor parallelism), or what is trained in a block has several dtypes
            and cannot be told apart.
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
    """The parts of what shall be gathered together whose trained parameters have another dtype than its adapters, or
    most of what trains: FSDP2 reduces the gradients of a unit in one tensor. They become units of their own."""
    trained = [
        (part, name, parameter)
        for part in unit.modules()
        for name, parameter in part.named_parameters(recurse=False)
        if parameter.requires_grad and not is_sharded(parameter)
    ]
    # An adapter reads the parameters under it past their layer, whose own unit would not be gathered then.
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
                f"a {type(part).__name__} of the model trains its {name} in {getattr(part, name).dtype}, and others "
                f"beside it train in {usual}, which FSDP2 cannot split together: train in one dtype (dtype: float32), "
                "or leave this out of what is trained (train_biases, modules_to_save)"
            )
    return list(others)
