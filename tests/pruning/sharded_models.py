"""Models that FSDP2 shards over ranks, and functions that each rank runs on them."""

from __future__ import annotations

import copy

import torch
from image_models import image_model, images
from tiny_models import two_blocks
from torch import nn
from torch.distributed import device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from sparsefit import PruningConfig, collect_statistics, prune, prune_from_statistics
from sparsefit.pruning.blocks import find_block_lists
from sparsefit.ranks import own_rank
from sparsefit.recovery.gather_shards import whole_on_first_rank

SAMPLES = torch.randint(3, 61, (9, 12), generator=torch.Generator().manual_seed(0))
SHARES = {1: [9], 2: [6, 3], 4: [4, 2, 2, 1]}  # samples of each rank
METHODS = {
    "wanda": {},
    "none": {"update": "none"},
    "2:4": {"pattern": "2:4"},
    "layer": {"granularity": "layer"},
    "columns": {"granularity": "(output, 8)"},
    "input": {"granularity": "input"},
    "owl": {"allocation": "owl"},
    "magnitude": {"score": "magnitude"},
    "swaps": {"swaps": 5},
    "sparsegpt": {"score": "sparsegpt", "reconstruction": "iterative"},
    "least_squares": {"swaps": 5, "reconstruction": "least_squares"},
    "least_squares none": {"update": "none", "reconstruction": "least_squares"},
}
POINTS = {
    **{("llama", method): settings for method, settings in METHODS.items()},
    **{(name, "wanda"): {} for name in ("mixtral", "gpt2", "convnext")},
    **{(name, "sparsegpt"): METHODS["sparsegpt"] for name in ("mixtral", "gpt2", "convnext")},
    ("llama in one unit", "wanda"): {},
    ("llama in one unit", "sparsegpt"): METHODS["sparsegpt"],
    ("llama in small units", "wanda"): {},
    ("plain", "wanda"): {},
    ("in between", "wanda"): {},
    ("sparse", "keep"): {"existing_zeros": "keep", "sparsity": 0.6},
    ("sparse", "adopt"): {"existing_zeros": "adopt"},
    ("padded", "wanda"): {},
    ("looped", "wanda"): {},
}


ON_FOUR = [
    *((name, method) for name in ("llama", "gpt2", "mixtral") for method in ("wanda", "sparsegpt")),
    *(("llama", method) for method in ("owl", "swaps", "least_squares none")),
    *((name, "wanda") for name in ("llama in one unit", "plain", "in between", "padded")),
]


class Looped(nn.Module):
    """Calls its only block, which is a unit, several times."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12))

    def forward(self, x):
        for _ in range(3):
            x = x + self.block(x)
        return x


class Plain(nn.Module):
    """Layers whose widths cannot be divided evenly among ranks; one has fewer rows than ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(12, 7), nn.Linear(7, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.last(self.second(self.first(x).relu()).relu())


class InBetween(nn.Module):
    """Computes something between its blocks, so that these cannot be run one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.ReLU()) for _ in range(3))
        self.blocks = nn.ModuleList(nn.Sequential(*block, nn.Linear(12, 12)) for block in self.blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x) * 2
        return x


class Padded(nn.Module):
    """Finds the padding from its input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 8)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=ids == 0)
        return x


def make_models():
    torch.manual_seed(0)
    models = {name: two_blocks(name) for name in ("llama", "mixtral", "gpt2")}
    models |= {"llama in one unit": models["llama"], "llama in small units": models["llama"]}
    models |= {"convnext": image_model("ConvNext"), "plain": Plain(), "in between": InBetween(), "padded": Padded()}
    models["looped"] = Looped()
    models["sparse"] = copy.deepcopy(models["llama"])
    prune(models["sparse"], config=PruningConfig(score="magnitude", sparsity=0.3))
    return models


def batches_for(name, rank, ranks):
    shares = SHARES[ranks]
    own = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
    if name == "convnext":
        return list(images(9)[own].split(2))
    if name == "padded":
        ids = SAMPLES.clone()
        ids[::2, 9:] = 0
        return list(ids[own].split(2))
    if name in ("plain", "in between", "looped"):
        return list(torch.randn(9, 12, generator=torch.Generator().manual_seed(1))[own].split(2))
    return [{"input_ids": one} for one in SAMPLES[own].split(2)]


def shard(model, name):
    """Shard a model with a unit for each block and one for the rest, or in the way with this name."""
    parts = [block for blocks in find_block_lists(model) for block in blocks]
    if name.endswith("small units"):
        parts = [part for block in parts for part in (*block.children(), block) if any(True for _ in part.parameters())]
    if name == "looped":
        parts = [model.block]
    for part in parts if not name.endswith("one unit") else ():
        fully_shard(part)
    return fully_shard(model)


def whole(model):
    """The whole of each parameter; each must be a shard."""
    return {name: p.detach().full_tensor() for name, p in model.named_parameters() if isinstance(p, DTensor)}


def state_of(model, result):
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    weights = whole(model) if sharded else {n: p.detach().clone() for n, p in model.named_parameters()}
    account = (result.update, result.tokens, result.left_dense, result.dense_sizes, result.dense_zeros)
    return {"digest": result.masks.digest(), "weights": weights, "account": account, "notes": result.notes}


def pruned(models, rank, ranks):
    found = {}
    for name, method in ON_FOUR if ranks == 4 else POINTS:
        settings = POINTS[name, method]
        model = copy.deepcopy(models[name])
        model = shard(model, name) if ranks > 1 else model
        result = prune(model, batches_for(name, rank, ranks), PruningConfig(micro_batch_size=3, **settings))
        found[name, method] = state_of(model, result)
    model, config = copy.deepcopy(models["llama"]), PruningConfig(update="none", micro_batch_size=3)
    model = shard(model, "llama") if ranks > 1 else model
    statistics = collect_statistics(model, batches_for("llama", rank, ranks), [config])
    found["llama", "statistics"] = state_of(model, prune_from_statistics(model, statistics, config))
    return found


def raised(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def write_badly(model, rank):
    with whole_on_first_rank(model):
        if rank == 0:
            raise OSError("the disk is full")


def broken_off(models, rank):
    """The error of each rank if one rank fails during pruning, and whether all have their dense shards."""
    reported = {}

    def failing_at(model, layer, call):
        calls = []

        def hook(*_):
            calls.append(1)
            if len(calls) == call and rank == 1:
                raise MemoryError("no memory is left")

        model.get_submodule(layer).register_forward_pre_hook(hook)

    def progress_of(limit):
        def progress(done, total):
            if done == limit and rank == 1:
                raise TimeoutError("time is up")

        return progress

    places = {
        "the first pass": ("model.layers.0.mlp.up_proj", 1),
        "a capturing pass": ("model.layers.0.mlp.up_proj", 3),
        "the first block": ("model.layers.0.mlp.up_proj", 5),
        "the second block": ("model.layers.1.mlp.up_proj", 3),
    }
    for place, (layer, call) in places.items():
        model = shard(copy.deepcopy(models["llama"]), "llama")
        dense = whole(model)
        failing_at(model, layer, call)
        error = raised(prune, model, batches_for("llama", rank, 2), PruningConfig(micro_batch_size=1))
        reported[place] = error, all(torch.equal(dense[name], weight) for name, weight in whole(model).items())
    model = shard(copy.deepcopy(models["llama"]), "llama")
    config, dense = PruningConfig(micro_batch_size=1), whole(model)
    error = raised(prune, model, batches_for("llama", rank, 2), config, progress=progress_of(8))
    reported["progress"] = error, all(torch.equal(dense[name], weight) for name, weight in whole(model).items())
    with torch.no_grad():
        batches = [{"inputs_embeds": torch.full((1, 3, model.config.hidden_size), torch.nan if rank else 1.0)}]
    error = raised(prune, model, batches, config)
    reported["data"] = error, all(torch.equal(dense[name], weight) for name, weight in whole(model).items())
    reported["writing"] = raised(write_badly, model, rank), True
    result = prune(model, batches_for("llama", rank, 2), PruningConfig(micro_batch_size=3))  # none has left a trace
    reported["afterwards"] = result.masks.digest(), True
    return reported


def masks_on_shards(models, rank):
    """The checks of a mask set on a sharded model: dense, pruned, and after one rank changed a pruned weight."""
    model = shard(copy.deepcopy(models["gpt2"]), "gpt2 in one unit")
    masks = prune(copy.deepcopy(models["gpt2"]), config=PruningConfig(score="magnitude")).masks
    with torch.no_grad():
        model(**batches_for("gpt2", rank, 2)[0])  # leaves the unit gathered
    dense = raised(masks.verify, model)
    masks.apply(model)
    applied = raised(masks.verify, model), state_of(model, prune(model, config=PruningConfig(existing_zeros="adopt")))
    name = next(iter(masks))
    if rank == 1:
        shard_of_rank = model.get_parameter(name).detach().to_local()
        shard_of_rank[shard_of_rank == 0] = 1.0
    return {"dense": dense, "applied": applied, "broken": raised(masks.verify, model), "masks": masks.state_dict()}


def refused(models, rank):
    """The errors for unsupported layouts, and whether anything was changed."""
    mesh = device_mesh.init_device_mesh("cpu", (2,))
    grid = device_mesh.init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    layouts = {
        "columns": lambda model: fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(p.ndim - 1)),
        "replicas": lambda model: fully_shard(model, mesh=grid),
        "products": lambda model: parallelize_module(model, mesh, {"blocks.0.2": ColwiseParallel()}),
        "device": lambda model: fully_shard(model, mesh=mesh),
        "fisher": lambda model: fully_shard(model, mesh=mesh),
    }
    reported = {}
    for name, split in layouts.items():
        model = split(copy.deepcopy(models["in between"]))
        settings = {"device": {"device": "cpu"}, "fisher": {"allocation": "fisher"}}.get(name, {})
        error = raised(prune, model, batches_for("in between", rank, 2), PruningConfig(**settings))
        reported[name] = (
            error,
            all(bool(p.detach().to_local().all()) for p in model.parameters() if isinstance(p, DTensor)),
        )
    return reported


def pruned_together(ranks):
    models = make_models()
    torch.distributed.init_process_group("gloo")
    rank = own_rank()
    found = {"pruned": pruned(models, rank, ranks)}
    if ranks == 2:
        found |= {"broken off": broken_off(models, rank), "masks": masks_on_shards(models, rank)}
        found |= {"refused": refused(models, rank)}
    return found
