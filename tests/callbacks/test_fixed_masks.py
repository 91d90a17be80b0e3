"""Masks that hold whatever trains, and what a checkpoint may not bring back."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from small_runs import (
    Classifier,
    fit,
    labelled,
    momentum,
    trainable,
)
from torch import nn

from sparsefit.callbacks import WandaPruning
from sparsefit.errors import MaskError

# Fixed masks.


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.model.blocks)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model.blocks, optimizer, lr=0.05)


def adamw(parameters):
    return torch.optim.AdamW(trainable(parameters), lr=0.05, weight_decay=0.1)


TRAININGS = {
    "momentum": (momentum, [], {}),
    "adamw": (adamw, [], {}),
    "lbfgs": (lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=3), [], {}),
    "clipping and accumulation": (momentum, [], {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}),
    "bf16": (adamw, [], {"precision": "bf16-mixed"}),
    "unfreezing first": (momentum, [Unfreeze], {}),
    "weight averaging": (adamw, [lambda: WeightAveraging()], {}),
    "swa": (momentum, [lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)], {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("pruning_first", [True, False])
@pytest.mark.parametrize("name", TRAININGS)
def test_masks_hold_whatever_trains(tmp_path, name, pruning_first):
    optimizer, others, settings = TRAININGS[name]
    module, pruning = Classifier(optimizer), WandaPruning()
    start = copy.deepcopy(module.model.blocks)
    callbacks = [other() for other in others]
    callbacks = [pruning, *callbacks] if pruning_first else [*callbacks, pruning]
    checkpoints = ModelCheckpoint(tmp_path, save_top_k=-1)
    fit(module, labelled(), *callbacks, checkpoints, max_epochs=4, enable_checkpointing=True, **settings)
    pruning.masks.verify(module)
    for file in tmp_path.glob("*.ckpt"):
        pruning.masks.verify(torch.load(file, weights_only=True)["state_dict"])
    assert len(list(tmp_path.glob("*.ckpt"))) == 4
    for was, block in zip(start, module.model.blocks, strict=True):
        assert (block.up.weight == 0).float().mean() == 0.5
        changed = (was.up.weight != block.up.weight).sum() - (block.up.weight == 0).sum()
        assert changed > 0.25 * block.up.weight.numel()  # about half of the kept ones sit behind a dead ReLU


def test_the_guard_is_gone_after_the_fit():
    module = Classifier()
    fit(module, labelled(), WandaPruning())
    with pytest.raises(ZeroDivisionError):
        fit(module, labelled(), WandaPruning(), Fail())
    for parameter in module.parameters():
        parameter.grad = None
    module(torch.ones(2, 6)).sum().backward()
    weight = module.model.blocks[0].down.weight
    assert (weight.grad[weight == 0] != 0).any()


class Fail(Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        raise ZeroDivisionError


class BringBack(Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            weight = pl_module.model.blocks[1].down.base_layer.weight
            with torch.no_grad():
                weight[weight == 0] += 1


class Frozen(nn.Module):
    """A frozen layer next to a trained one."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(layer.out_features))

    def forward(self, x):
        return self.base_layer(x) * self.scale


@pytest.mark.parametrize("with_checkpoints", [True, False])
def test_a_weight_brought_back_is_found_before_it_is_saved(tmp_path, with_checkpoints):
    module = Classifier()
    module.model.blocks[1].down = Frozen(module.model.blocks[1].down)
    others = [ModelCheckpoint(tmp_path, save_top_k=-1)] if with_checkpoints else []
    with pytest.raises(MaskError, match=r"model\.blocks\.1\.down\.weight \(64\)"):
        fit(
            module, labelled(), WandaPruning(), BringBack(1), *others,
            max_epochs=2, enable_checkpointing=with_checkpoints,
        )  # fmt: skip
    assert len(list(tmp_path.iterdir())) == with_checkpoints


def test_masks_damaged_in_a_checkpoint_are_refused(tmp_path):
    trainer = fit(Classifier(), labelled(), WandaPruning(), max_steps=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    next(iter(checkpoint["callbacks"]["WandaPruning"]["masks"].values()))["bits"][0] ^= 1
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(MaskError, match="checkpoint is damaged"):
        fit(Classifier(), labelled(), WandaPruning(), max_steps=2, ckpt_path=tmp_path / "a.ckpt")


def test_weights_that_came_back_in_a_checkpoint_are_refused(tmp_path):
    trainer = fit(Classifier(), labelled(), WandaPruning(), max_steps=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    checkpoint["state_dict"]["model.blocks.0.up.weight"] += 1
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(MaskError, match=r"model\.blocks\.0\.up\.weight \(64\)"):
        fit(Classifier(), labelled(), WandaPruning(), max_steps=2, ckpt_path=tmp_path / "a.ckpt")


@pytest.mark.parametrize("manual", [False, True])
def test_weights_unfrozen_within_an_epoch_are_guarded_from_the_next_step_on(manual):
    class Unfreezes(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = not manual
            self.model.blocks.requires_grad_(False)

        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 1:
                self.model.blocks[0].requires_grad_(True)

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 2:
                self.model.blocks[1].requires_grad_(True)  # after the graph was made: no gradient in this step
            if manual:
                self.manual_backward(loss)
                optimizer = self.optimizers().optimizer  # as torch has it: Lightning does not see its steps
                optimizer.step()
                optimizer.zero_grad()
            return loss

    pruning, module = WandaPruning(0.5), Unfreezes()
    before = {name: p.clone() for name, p in module.named_parameters()}

    class Check(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            pruning.masks.verify(pl_module)

    fit(module, labelled(16), pruning, Check(), max_epochs=1)
    for name in pruning.masks:
        assert not torch.equal(module.get_parameter(name)[pruning.masks[name]], before[name][pruning.masks[name]])
