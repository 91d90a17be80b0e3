"""Runs that are resumed with other settings: which settings prevent it, and which may change."""

from __future__ import annotations

import copy
import shutil
from importlib.util import find_spec

import pytest
import torch
from resumed_runs import WORDS, assert_same, callbacks, data, every_step, fit, module, text_file, tokenizer, weights
from safetensors.torch import load_file, save_file

from sparsefit.callbacks.run_report import RunReport
from sparsefit.data import TextFilesDataModule
from sparsefit.errors import ConfigError, RunFolderError
from sparsefit.modules import CausalLMModule
from sparsefit.pruning import MaskSet
from sparsefit.recovery.distill import DistillSettings

STEPS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that is not interrupted, with a checkpoint of each step: its folder, weights and rates."""
    folder = tmp_path_factory.mktemp("straight")
    trained = module()
    trainer = fit(
        trained, data(folder), *callbacks(folder / "run"), every_step(folder / "run/checkpoints"), max_steps=STEPS
    )
    return folder, weights(trained), rates(trainer)


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the run: its folder and a checkpoint in it, and a function that goes on from there."""
    shutil.copytree(run[0] / "run", tmp_path / "run")
    shutil.copy(run[0] / "text.jsonl", tmp_path)
    path = tmp_path / "run/checkpoints/step=2.ckpt"
    change(path, lambda checkpoint: checkpoint["sparsefit"]["base"].update(folder=str(tmp_path / "run")))

    def resume(trained, read=None, **settings):
        more = callbacks(tmp_path / "run")
        return fit(trained, read or data(tmp_path), *more, ckpt_path=path, **({"max_steps": STEPS} | settings))

    return tmp_path, path, resume


def change(path, edit):
    checkpoint = torch.load(path, weights_only=True)
    edit(checkpoint)
    torch.save(checkpoint, path)


def rates(trainer):
    (report,) = (callback.report for callback in trainer.callbacks if isinstance(callback, RunReport))
    return [point["learning_rate"] for point in report["training"]["history"]]


# Changes that prevent a resume. Each returns the new settings, the error and its message.


def other_rank(folder, path):
    return {"r": 3}, {}, ConfigError, r"another recipe: adapter.r was 2 and is 3"


def other_targets(folder, path):
    targets = {"target_modules": ["q_proj", "down_proj"]}
    return targets, {}, ConfigError, r"adapter.target_modules was \['q_proj', 'v_proj'\]"


def other_form(folder, path):
    return {"form": "masked_lora"}, {}, ConfigError, r"adapter.form was 'lora' and is 'masked_lora'"


def other_masks(folder, path):
    masks = MaskSet()
    masks.add("some.weight", torch.ones(2, 2, dtype=torch.bool))
    masks.save(folder / "run/masks.safetensors")
    return {}, {}, RunFolderError, r"its masks.safetensors is that of another model or run"


def moved_base(folder, path):
    (folder / "run/base").rename(folder / "elsewhere")
    message = rf"was not found. Looked in {folder / 'run'}: no base/\. Put base/ and masks.safetensors"
    return {}, {}, RunFolderError, message


def other_base(folder, path):
    tensors = load_file(folder / "run/base/model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, folder / "run/base/model.safetensors", metadata={"format": "pt"})
    return {}, {}, RunFolderError, r"model.norm.weight in its base/ is damaged, or that of another run"


def a_teacher(folder, path):
    settings = {"distill": DistillSettings(0.3)}
    return {"settings": settings}, {}, ConfigError, r"distill was None and is \{'weight': 0.3, 'temperature': 1.0\}"


def another_teacher(folder, path):
    hparams = {"distill": {"weight": 0.5, "temperature": 1.0}}
    change(path, lambda checkpoint: checkpoint["hyper_parameters"].update(hparams))
    settings = {"distill": DistillSettings(0.5, 2.0)}
    return {"settings": settings}, {}, ConfigError, r"another recipe: distill.temperature was 1.0 and is 2.0\. Resume"


def other_optimizer(folder, path):
    change(path, lambda checkpoint: checkpoint["hyper_parameters"].update(optimizer="adamw_8bit"))
    return {}, {}, ConfigError, r"optimizer was 'adamw_8bit' and is 'adamw'"


class Momentum(CausalLMModule):
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def an_optimizer_of_the_modules_own(folder, path):
    return {"cls": Momentum}, {}, ConfigError, r"has the state of AdamW, and this run trains with SGD"


def other_windows(folder, path):
    message = r"sequence_length was 16 and is 8, batch_size was 2 and is 3, shuffle_buffer was 5 and is 4, seed was 0"
    settings = {"sequence_length": 8, "batch_size": 3, "shuffle_buffer": 4, "seed": 9}
    return {}, settings, ConfigError, message


def more_workers(folder, path):
    return {}, {"num_workers": 2}, ConfigError, r"other training data.*: num_workers was 0 and is 2\. Resume with"


def other_calibration(folder, path):
    return {}, {"calibration_samples": 5}, ConfigError, r"calibration_samples was 4 and is 5\. Resume"


def other_text(folder, path):
    shutil.copy(folder / "text.jsonl", folder / "other.jsonl")
    source = {"train_source": str(folder / "other.jsonl")}
    return {}, source, ConfigError, r"train_source was '.*text.jsonl' and is '.*other.jsonl'"


def part_of_the_text(folder, path):
    return {}, {"train_source": f"{folder}/text.jsonl[:5]"}, ConfigError, r"train_source was .* is '.*text.jsonl\[:5\]'"


def a_text_that_grew(folder, path):
    with open(folder / "text.jsonl", "a") as file:
        file.write(f'{{"text": "{" ".join(WORDS)}"}}\n')
    change(path, lambda checkpoint: rename(checkpoint, "train_source", str(folder / "text.jsonl")))
    return {}, {}, ConfigError, r"train_source is '.*text.jsonl' as it was, but what it holds has changed"


def other_tokenizer(folder, path):
    other = copy.deepcopy(tokenizer())
    other.add_tokens(["zebra"])
    message = r"tokenizer is '\w+' as it was, but what it holds has changed"
    return {}, {"tokenizer": other}, ConfigError, message


def other_kind_of_data(folder, path):
    message = r"position in the data of TextDataModule, and this run trains on those of TextFilesDataModule"
    return {}, {"kind": TextFilesDataModule}, ConfigError, message


def rename(checkpoint, setting, name):
    for each in (setting, "calibration_source"):
        checkpoint["TextDataModule"]["settings"][each][0] = name if each == setting else None


BAD = [
    other_rank, other_targets, other_form, other_masks, moved_base, other_base, a_teacher, another_teacher,
    other_optimizer, an_optimizer_of_the_modules_own, other_windows, more_workers, other_calibration,
    other_text, part_of_the_text, a_text_that_grew, other_tokenizer, other_kind_of_data,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("spoil", BAD)
def test_a_resume_that_is_refused_says_why_and_overwrites_nothing(copied, spoil):
    folder, path, resume = copied
    of_module, of_data, error, message = spoil(folder, path)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    trained = module(**of_module)
    start = weights(trained)
    with pytest.raises(error, match=message):
        resume(trained, data(folder, **of_data))
    if spoil is not an_optimizer_of_the_modules_own:  # which is only made when the model is whole
        assert_same(weights(trained), start)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_a_run_does_not_resume_with_eight_bit_moments(copied):
    with pytest.raises(ConfigError, match="optimizer was 'adamw' and is 'adamw_8bit'"):
        copied[2](module(settings={"optimizer": "adamw_8bit"}))


# What may change.


def older(checkpoint):
    """As checkpoints were before they knew so much."""
    del checkpoint["TextDataModule"]["settings"]
    del checkpoint["sparsefit"]["data"], checkpoint["sparsefit"]["optimizers"]
    del checkpoint["hyper_parameters"]["distill"], checkpoint["hyper_parameters"]["optimizer"]


@pytest.mark.parametrize("edit", [lambda checkpoint: None, older], ids=["now", "older"])
def test_what_decides_nothing_may_change(run, copied, edit):
    folder, path, resume = copied
    change(path, edit)
    (folder / "moved").mkdir()
    source = shutil.move(folder / "text.jsonl", folder / "moved")
    trained = module()
    read = data(folder, train_source=source, num_workers=1, test_windows=1, calibration_batch_size=3)
    assert rates(resume(trained, read)) == run[2]
    assert_same(weights(trained), run[1])


def test_a_text_apart_may_be_calibrated_on_in_another_way(tmp_path):
    folder, file = tmp_path, text_file(tmp_path)
    apart = {"train_source": f"{file}[:5]", "calibration_source": f"{file}[5:]"}
    whole, resumed = module(), module()
    fit(whole, data(folder, **apart), *callbacks(folder / "apart"), every_step(folder / "saved"), max_steps=2)
    read = data(folder, **apart, calibration_samples=2)
    fit(resumed, read, *callbacks(folder / "apart"), ckpt_path=folder / "saved/step=1.ckpt", max_steps=2)
    assert_same(weights(resumed), weights(whole))
    assert sum(len(batch["input_ids"]) for batch in read.calibration_dataloader()) == 2


def test_other_data_may_be_tested_on(copied):
    folder, path, resume = copied
    trained = module(settings={"distill": DistillSettings()})
    trainer = resume(module())
    other = data(folder, sequence_length=8, seed=4)
    (figures,) = trainer.test(trained, other, ckpt_path=path, verbose=False)
    assert figures["test_perplexity"] == pytest.approx(trained.evaluate(other.test_dataloader())["perplexity"])


@pytest.mark.parametrize("driven", [True, False])
def test_another_learning_rate_counts_from_there_on(run, copied, driven):
    folder, path, _ = copied
    settings = {"learning_rate": 0.03, "weight_decay": 0.1}
    more = callbacks(folder / "run")[: 4 if driven else 3]
    trainer = fit(module(settings=settings), data(folder), *more, ckpt_path=path, max_steps=STEPS)
    (group,) = trainer.optimizers[0].param_groups
    assert group["weight_decay"] == 0.1
    # The budget drives the rate; without it the rate is that of the checkpoint, where the second step had been taken.
    expected = [rate * 3 for rate in run[2][2:]] if driven else [run[2][1] * 3] * 2
    assert rates(trainer) == pytest.approx([*run[2][:2], *expected])
