"""The dense model as the teacher of its pruned self."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader
from trained_models import IDS, assert_untouched, logits, snapshot, train

from sparsefit import PruningConfig, prune
from sparsefit.callbacks import WandaPruning
from sparsefit.errors import ConfigError
from sparsefit.modules.causal_lm import CausalLMModule
from sparsefit.recovery.adapters import AdapterSettings, attach_adapter, bind_masks
from sparsefit.recovery.distill import DenseTeacher, DistillSettings, divergence

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


# The loss.


def by_hand(student, teacher, counted, temperature):
    """Token by token in float64, as the formula reads."""
    student, teacher = student.double().numpy() / temperature, teacher.double().numpy() / temperature
    losses = []
    for at in np.ndindex(student.shape[:-1]):
        if counted is not None and not counted[at]:
            continue
        p = np.exp(teacher[at]) / np.exp(teacher[at]).sum()
        q = np.exp(student[at]) / np.exp(student[at]).sum()
        losses.append(sum(pi * (math.log(pi) - math.log(qi)) for pi, qi in zip(p, q, strict=True)))
    return temperature**2 * sum(losses) / max(1, len(losses))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("counting", ["all", "some", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_divergence_is_the_formula(temperature, counting, dtype):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 7).to(dtype), 2 * torch.randn(2, 3, 7).to(dtype)
    counted = {"all": None, "some": torch.rand(2, 3) > 0.5, "none": torch.zeros(2, 3, dtype=torch.bool)}[counting]
    got = divergence(student, teacher, counted, temperature)
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(by_hand(student, teacher, counted, temperature), rel=1e-5, abs=1e-7)


def test_the_divergence_is_zero_only_for_equals_and_teaches_the_student_alone():
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 7, requires_grad=True), torch.randn(4, 7, requires_grad=True)
    assert float(divergence(teacher, teacher + 3).detach()) == pytest.approx(0, abs=1e-6)
    loss = divergence(student, teacher.detach())
    assert float(loss.detach()) > 0.1
    loss.backward()
    # d/dz KL(p || softmax(z)) = softmax(z) - p
    expected = (student.softmax(-1) - teacher.softmax(-1)) / 4
    torch.testing.assert_close(student.grad, expected.detach())
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0.0}, "weight of the distillation is 0.0"),
        ({"weight": 1.5}, "weight of the distillation is 1.5"),
        ({"temperature": 0.0}, "temperature of the distillation is 0.0"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        DistillSettings(**settings)


# The teacher.


def taught(model, settings=None, batch=None, **pruning):
    """The teacher of a pruned model, the model in training mode, its masks, and a copy of the dense model."""
    dense = copy.deepcopy(model)
    if settings is not None:
        model = attach_adapter(model, settings)
    teacher = DenseTeacher(model)
    masks = prune(model, [{"input_ids": IDS} if batch is None else batch], PruningConfig(**pruning)).masks
    bind_masks(model, masks)
    teacher.settle(model)
    return teacher, model.train(), masks, dense


CASES = {
    "lora": ("llama", AdapterSettings("lora"), {}),
    "masked": ("llama", AdapterSettings("masked_lora", target_modules="all-linear"), {}),
    "masked, norms and biases": (
        "opt",
        AdapterSettings("masked_lora", target_modules=("q_proj", "fc1"), train_norms=True, train_biases=True),
        {},
    ),
    "hira with norms": ("llama", AdapterSettings("hira", train_norms=True), {}),
    "full": ("opt", AdapterSettings("full", target_modules="all-linear", train_norms=True, train_biases=True), {}),
    "all trains": ("llama", None, {}),
    "transposed": ("gpt2", AdapterSettings("masked_lora", target_modules="c_attn"), {}),
    "experts": ("mixtral", AdapterSettings("masked_lora"), {}),
    "updated weights": ("llama", AdapterSettings("masked_lora"), {"swaps": 3, "reconstruction": "least_squares"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_it_answers_as_the_dense_model_bit_for_bit_and_leaves_no_trace(tiny_model, case, tied):
    architecture, settings, pruning = CASES[case]
    model = tiny_model(architecture, tie_word_embeddings=tied)
    teacher, model, masks, dense = taught(model, settings, **pruning)
    expected = logits(dense)
    for steps in (0, 3):
        train(model, masks, steps=steps)
        next(part for name, part in model.named_modules() if name.endswith("layers.1") or name.endswith("h.1")).eval()
        modes = {name: module.training for name, module in model.named_modules()}
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        before = snapshot(model)
        with teacher.in_place(model):
            assert torch.equal(model(input_ids=IDS).logits, expected)
            assert not any(module.training for module in model.modules())
        assert_untouched(model, before)
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        masks.verify(model)
        for _, matrix in masks.matrices_in(model):
            assert not torch.signbit(matrix[matrix == 0]).any()
        assert not torch.equal(logits(model.eval()), expected)
        model.train()


def test_an_error_inside_leaves_the_student_as_it_was(tiny_model):
    settings = AdapterSettings("masked_lora", train_norms=True, dropout=0.2)
    teacher, model, _, dense = taught(tiny_model("llama"), settings)
    for name, parameter in model.named_parameters():  # as somebody may: PEFT would have both train
        if "lora_A" in name:
            parameter.requires_grad_(False)
    before, flags = snapshot(model), {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ZeroDivisionError), teacher.in_place(model):
        raise ZeroDivisionError
    assert_untouched(model, before)
    assert model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert torch.is_grad_enabled()
    with teacher.in_place(model):
        assert torch.equal(model(input_ids=IDS).logits, logits(dense))


def test_negative_zeros_of_the_dense_model(tiny_model):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[::2, ::3] = -0.0
    teacher, model, masks, dense = taught(model, AdapterSettings("masked_lora"))
    before = snapshot(model)
    with teacher.in_place(model):
        assert torch.equal(model(input_ids=IDS).logits, logits(dense))
    assert_untouched(model, before)
    pruned = model.get_base_model().model.layers[0].mlp.up_proj.weight[~masks["model.layers.0.mlp.up_proj.weight"]]
    assert not torch.signbit(pruned).any()


@pytest.mark.parametrize("form", ["full", "masked_lora"])
def test_under_autocast_the_student_computes_with_its_own_weights(tiny_model, form):
    """Autocast keeps the copies of weights that it has made; those of the teacher must not be found again."""
    settings = AdapterSettings(form, dropout=0.0, target_modules=("q_proj", "fc1"), train_biases=True)
    teacher, model, _, _ = taught(tiny_model("opt", dropout=0.0), settings)
    found = []
    for with_teacher in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            if with_teacher:
                with teacher.in_place(model):
                    model(input_ids=IDS)
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_it_costs_the_removed_values_and_one_bit_a_weight(tiny_model, sparsity, dtype):
    settings = AdapterSettings("masked_lora", r=1)
    teacher, model, masks, _ = taught(tiny_model("llama").to(dtype), settings, sparsity=sparsity)
    weights = sum(count for count, _ in masks.counts().values())
    zeros = sum(count for _, count in masks.counts().values())
    adapters = sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)
    removed = zeros * dtype.itemsize + weights / 8
    assert removed <= teacher.bytes <= removed + adapters + 3 * len(masks)
    assert teacher.bytes < 0.85 * weights * dtype.itemsize


def test_what_is_not_changed_costs_nothing(tiny_model):
    model = tiny_model("llama").requires_grad_(False)
    teacher = DenseTeacher(model)
    whole = sum(p.nbytes for p in model.parameters())
    assert teacher.bytes == whole
    teacher.settle(model)
    assert teacher.bytes == 0


def test_a_weight_that_changed_its_form_is_refused(tiny_model):
    model = tiny_model("llama")
    teacher = DenseTeacher(model)
    model.model.layers[0].mlp.up_proj.weight.data = model.model.layers[0].mlp.up_proj.weight.data.half()
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.up_proj\.weight was quantized"):
        teacher.settle(model)


def test_a_plain_module():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    x, dense = torch.randn(9, 6), copy.deepcopy(model).eval()
    teacher, model, _, _ = taught(model, batch=x)
    before = snapshot(model)
    with teacher.in_place(model):
        assert torch.equal(model(x), dense(x))
    assert_untouched(model, before)


# In a fit.


def rows(count=6, size=4):
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 61, (count * size, 9), generator=random)
    return DataLoader([{"input_ids": row} for row in ids], size)


def fit(module, *callbacks, ckpt_path=None, **settings):
    trainer = Trainer(callbacks=[*callbacks], **QUIET | {"enable_checkpointing": False, "max_epochs": 2} | settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, rows(), ckpt_path=ckpt_path)
    return trainer


def away(module, dense):
    """How far a module's model is from another, on its training data."""
    module.eval()
    with torch.no_grad():
        losses = [divergence(module(**b).logits, dense(**b).logits) for b in rows()]
    module.train()
    return float(torch.stack(losses).mean())


class Begin(Callback):
    def on_train_start(self, trainer, pl_module):
        self.away = away(pl_module, self.dense)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("form", ["masked_lora", "hira", "full"])
def test_a_pruned_model_comes_nearer_to_its_dense_self(tiny_model, form, precision):
    settings = AdapterSettings(form, target_modules="all-linear", dropout=0.0)
    dense, begin = tiny_model("llama"), Begin()
    begin.dense = dense
    module = CausalLMModule(tiny_model("llama"), settings, DistillSettings(weight=1.0), learning_rate=1e-2)
    pruning = WandaPruning(calibration=list(rows(1)))
    trainer = fit(module, begin, pruning, precision=precision)
    assert away(module, dense) < 0.85 * begin.away
    assert float(trainer.callback_metrics["train_divergence"]) < begin.away
    pruning.masks.verify(module)


def test_the_loss_mixes_text_and_teacher(tiny_model):
    module = CausalLMModule(tiny_model("llama"), AdapterSettings(dropout=0.0), DistillSettings(0.3, 2.0))
    dense, batch = tiny_model("llama"), {"input_ids": IDS, "attention_mask": (torch.arange(9) < 7).long().expand(4, 9)}
    module.setup("fit")
    prune(module, [batch["input_ids"]], PruningConfig(), forward=lambda ids: module(input_ids=ids))
    module.on_train_start()
    module.log = lambda *args, **kwargs: None
    loss = module.training_step(batch, 0)
    with torch.no_grad():
        own, teachers = module(**batch).logits, dense(**batch).logits
    text = nn.functional.cross_entropy(own[:, :6].flatten(0, 1), IDS[:, 1:7].flatten())
    counted = batch["attention_mask"][:, 1:].bool()  # what stands before a token that counts
    expected = 0.7 * text + 0.3 * by_hand(own[:, :-1], teachers[:, :-1], counted, 2.0)
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-4)


def test_after_a_resume_the_teacher_is_still_the_dense_model(tiny_model, tmp_path):
    settings = AdapterSettings("full", target_modules="all-linear")
    dense = tiny_model("llama")

    def module():
        return CausalLMModule(tiny_model("llama"), settings, DistillSettings(), learning_rate=1e-2)

    first = module()
    fit(first, WandaPruning(calibration=list(rows(1))), max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    again = module()
    fit(again, WandaPruning(), max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    with again.dense_teacher.in_place(again.model):
        assert torch.equal(again.model(input_ids=IDS).logits, logits(dense))
    straight = module()
    fit(straight, WandaPruning(calibration=list(rows(1))), max_epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), again.parameters(), strict=True))


def test_running_means_are_the_dense_models_too():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    x = torch.randn(8, 4)
    expected = model.eval()(x).detach()
    teacher = DenseTeacher(model)
    with torch.no_grad():
        model[0].weight[:, 0] = 0
    assert not teacher.settled
    teacher.settle(model)
    assert teacher.settled
    model.train()(x + 3)  # moves them
    means = model[1].running_mean.clone()
    with teacher.in_place(model):
        assert torch.equal(model(x), expected)
    assert torch.equal(model[1].running_mean, means)
