"""Settings as people write them: numbers of any kind, patterns as YAML reads them, and names with a slip."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Command

import sparsefit
from sparsefit import AdapterSettings, DistillSettings, GPUHourBudget, PruningConfig, RunReport, WandaPruning
from sparsefit.callbacks import BlockwiseReconstruction
from sparsefit.cli.study_training import TrainingSettings
from sparsefit.errors import ConfigError
from sparsefit.modules import ImageClassifierModule
from sparsefit.settings import as_number

NUMBERS = [np.float16(0.57), np.float32(0.57), np.float64(0.57), np.array(0.57), torch.tensor(0.57), Fraction(57, 100)]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: type(number).__name__)
def test_numbers_of_every_kind_are_the_decimal_that_they_are_written_as(number):
    config = PruningConfig(sparsity=number, damping=number)
    assert (config.sparsity, config.damping) == (0.57, 0.57)
    assert config.exact_sparsity == Fraction(57, 100)


@pytest.mark.parametrize("number", [np.int8(3), np.int64(3), np.uint16(3), np.array(3), torch.tensor(3)], ids=repr)
def test_whole_numbers_of_every_kind(number):
    config = PruningConfig(swaps=number, micro_batch_size=number)
    assert (config.swaps, config.micro_batch_size) == (3, 3)
    assert type(config.swaps) is int
    assert WandaPruning(0.5, calibration_samples=number).calibration_samples == 3


@pytest.mark.parametrize("value", ["0.5", None, True, np.bool_(True), np.nan, np.inf, np.ones(2), torch.ones(1), 1j])
def test_what_is_no_number(value):
    assert as_number(value) is None
    with pytest.raises(ConfigError):
        PruningConfig(damping=value)


@pytest.mark.parametrize(
    ("given", "pattern", "sparsity"),
    [
        ("2:4", "2:4", 0.5),
        (2 * 60 + 4, "2:4", 0.5),
        (4 * 60 + 8, "4:8", 0.5),
        (16 * 60 + 32, "16:32", 0.5),
        (64, "1:4", 0.75),
    ],
)
def test_patterns_as_they_are_quoted_and_as_yaml_reads_them_unquoted(given, pattern, sparsity):
    config = PruningConfig(pattern=given)
    assert (config.pattern, config.sparsity) == (pattern, sparsity)
    assert WandaPruning(pattern=given).config == config


@pytest.mark.slow
def test_an_unquoted_pattern_in_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("pruning:\n  pattern: 2:4\n", encoding="utf-8")
    code = (
        "import sys; from unittest import mock; from sparsefit.cli import main; from lightning.pytorch import Trainer\n"
        f"sys.argv = ['sparsefit', 'fit', '--config', 'configs/quickstart.yaml', '--config', {str(recipe)!r},\n"
        f"            '--pruning.sparsity', 'null', '--run.folder', {str(tmp_path / 'run')!r}]\n"
        "with mock.patch.object(Trainer, 'fit', autospec=True) as fit: main()\n"
        "callbacks = fit.call_args.args[0].callbacks\n"
        "print('config', next(c.config.pattern for c in callbacks if type(c).__name__ == 'WandaPruning'))\n"
    )
    (tmp_path / "script.py").write_text(code, encoding="utf-8")
    run = Command(["python", tmp_path / "script.py"], Path(__file__).parents[1]).wait()
    assert "config 2:4" in run.stdout, run.stdout + run.stderr


def test_a_pattern_needs_no_sparsity_and_bears_none_that_contradicts():
    assert PruningConfig(sparsity=None, pattern="1:4").sparsity == 0.75
    assert PruningConfig(sparsity=0.75, pattern="1:4").sparsity == 0.75
    assert PruningConfig().sparsity == 0.5
    with pytest.raises(ConfigError, match=r"sparsity 0\.5 contradicts pattern '1:4', which is 0\.75"):
        PruningConfig(sparsity=0.5, pattern="1:4")


@pytest.mark.parametrize(
    ("make", "name", "near"),
    [
        (PruningConfig, "sparsty", "sparsity"),
        (WandaPruning, "granularty", "granularity"),
        (WandaPruning, "calibration_sample", "calibration_samples"),
        (GPUHourBudget, "gpu_hour", "gpu_hours"),
        (RunReport, "foldr", "folder"),
        (AdapterSettings, "aplha", "alpha"),
        (DistillSettings, "temprature", "temperature"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_slip_in_a_name_is_reported_with_the_nearest_one(make, name, near):
    with pytest.raises(ConfigError, match=f"{make.__name__} has no setting '{name}': did you mean '{near}'"):
        make(**{name: 1})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: WandaPruning(0.5, "2:4"), "WandaPruning: too many positional arguments; give its settings by name"),
        (GPUHourBudget, "GPUHourBudget: missing a required argument: 'gpu_hours'"),
    ],
)
def test_arguments_that_do_not_fit_are_an_error_of_the_projects_own(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_the_callback_names_every_setting_of_a_pruning():
    import inspect

    names = set(inspect.signature(WandaPruning).parameters)
    assert set(PruningConfig.__dataclass_fields__) | {"calibration", "calibration_samples"} == names
    for name in names:
        assert f"        {name}: " in WandaPruning.__doc__, name


def test_what_most_need_is_at_the_top_of_the_package():
    for name in ("WandaPruning", "GPUHourBudget", "RunReport", "AdapterSettings", "MaskSet"):
        assert name in sparsefit.__all__
        assert name in dir(sparsefit)
    for name in sparsefit.__all__:
        assert getattr(sparsefit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'WandaPrunning'"):
        sparsefit.WandaPrunning  # noqa: B018


def test_a_path_does_where_a_folder_or_file_is_named(tmp_path):
    from sparsefit.data import TextDataModule
    from sparsefit.modules import CausalLMModule
    from sparsefit.modules.loading import load_causal_lm, load_tokenizer

    load_causal_lm("tiny-llama").save_pretrained(tmp_path / "model")
    load_tokenizer("tiny-llama").save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("A sentence of some words. " * 200, encoding="utf-8")
    module = CausalLMModule(tmp_path / "model")
    data = TextDataModule(tmp_path / "model", tmp_path / "text.txt", sequence_length=32)
    assert module.hparams.model == data.hparams.tokenizer == str(tmp_path / "model")
    data.setup("fit")
    assert next(iter(data.train_dataloader()))["input_ids"].shape[1] == 32


RATES = [
    (lambda rate: ImageClassifierModule(torch.nn.Linear(2, 2), learning_rate=rate), "learning_rate"),
    (lambda rate: ImageClassifierModule(torch.nn.Linear(2, 2), weight_decay=rate), "weight_decay"),
    (lambda rate: ImageClassifierModule(torch.nn.Linear(2, 2), momentum=rate), "momentum"),
    (lambda rate: BlockwiseReconstruction(learning_rate=rate), "the learning_rate of the reconstruction"),
    (lambda rate: GPUHourBudget(rate), "gpu_hours"),
    (lambda rate: GPUHourBudget(1.0, reserve=rate), "reserve"),
    (lambda rate: GPUHourBudget(1.0, warmup_steps=rate), "warmup_steps"),
    (lambda rate: AdapterSettings(alpha=rate), "alpha"),
    (lambda rate: AdapterSettings(dropout=rate), "dropout"),
    (lambda rate: DistillSettings(weight=rate), "weight"),
    (lambda rate: DistillSettings(temperature=rate), "temperature"),
    (lambda rate: TrainingSettings(learning_rate=rate), "learning_rate"),
    (lambda rate: TrainingSettings(epochs=rate), "epochs"),
]


@pytest.mark.parametrize("rate", [np.nan, np.inf, -1.0, "0.1", True], ids=repr)
@pytest.mark.parametrize(("make", "name"), RATES, ids=[f"{name}-{n}" for n, (_, name) in enumerate(RATES)])
def test_a_rate_is_a_finite_number_in_its_range(make, name, rate):
    with pytest.raises(ConfigError, match=f"{name}.* {rate!r}"):
        make(rate)


@pytest.mark.parametrize("value", ["false", 2, None])
def test_a_switch_is_true_or_false(value):
    with pytest.raises(ConfigError, match=r"GPUHourBudget: drive_learning_rate is .*: it must be True or False"):
        GPUHourBudget(1.0, drive_learning_rate=value)


@pytest.mark.parametrize("names", [5, [5], None])
def test_names_are_text(names):
    with pytest.raises(ConfigError, match=r"target_modules is .*: it must be a name, or a list of names"):
        AdapterSettings(target_modules=names)
