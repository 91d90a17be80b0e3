"""Wrong input of every command ends in one sentence of the project's own: no traceback, and no page of usage."""

from __future__ import annotations

import math

import pytest
import yaml

pytestmark = pytest.mark.slow

# What a recipe says, and words that must be in the answer. `...` takes a setting out.
RECIPES = [
    ("trainer.max_steps", -5, "You passed in -5"),
    ("trainer.max_steps", "many", "trainer.max_steps is 'many': it must be a whole number"),
    ("trainer.devices", 0, "devices=0"),
    ("trainer.accelerator", "quantum", "invalid accelerator name"),
    ("trainer.precision", "64-mixed", "trainer.precision is 64-mixed"),
    ("trainer.strategy", "nope", "invalid strategy name"),
    ("trainer.num_nodes", 0, "num_nodes"),
    ("trainer.max_time", "soon", "Timer(duration='soon')"),
    ("trainer.limit_train_batches", 2.5, "limit_train_batches"),
    ("trainer.accumulate_grad_batches", 0, "trainer.accumulate_grad_batches is 0"),
    ("trainer.val_check_interval", 0, "trainer.val_check_interval is 0"),
    ("trainer.log_every_n_steps", 0, "trainer.log_every_n_steps is 0"),
    ("trainer.gradient_clip_val", -1.0, "trainer.gradient_clip_val is -1.0"),
    ("trainer.gradient_clip_algorithm", "x", "gradient_clip_algorithm"),
    ("trainer.profiler", "nope", "profiler"),
    ("trainer.callbacks", [{"class_path": "nope.Nope"}], "nope.Nope cannot be used: No module named 'nope'"),
    ("trainer.callbacks", [{"class_path": "lightning.pytorch.callbacks.EarlyStopping"}], "EarlyStopping needs monitor"),
    ("trainer.logger", {"class_path": "nope"}, "it must be the path of a class"),
    ("trainer.deterministic", "maybe", "it must be true or false or one of 'warn'"),
    ("trainer.min_steps", 5, "min_steps"),
    ("trainer.max_stepz", 5, "did you mean 'trainer.max_steps'?"),
    ("seed_everything", -3, "seed_everything is -3"),
    ("seed_everything", "x", "seed_everything is 'x'"),
    ("ckpt_path", "best", "give 'last', or the path of a checkpoint"),
    ("ckpt_path", "last", "there is no checkpoint"),
    ("ckpt_path", "hpc", "give 'last', or the path of a checkpoint"),
    ("ckpt_path", ".", "there is no checkpoint"),
    ("ckpt_path", 5, "ckpt_path is 5"),
    ("pruning", 5, "pruning is 5: it must be a mapping of settings"),
    ("pruning", "x", "pruning is 'x'"),
    ("pruning.nope", 1, "there is no setting pruning.nope"),
    ("pruning.sparsity", "half", "pruning.sparsity is 'half': it must be a number"),
    ("pruning.sparsity", math.nan, "sparsity is nan"),
    ("pruning.targets", 5, "pruning.targets is 5: it must be a list or text"),
    ("pruning.targets", ["nope"], "no prunable layer is named 'nope'"),
    ("pruning.calibration_samples", 10**6, "1000000 were asked for"),
    ("budget.gpu_hours", math.nan, "gpu_hours"),
    ("budget.gpu_hours", "long", "budget.gpu_hours is 'long'"),
    ("budget.gpu_hours", ..., "budget.gpu_hours is required"),
    ("budget.gpu_hour", 5, "did you mean 'budget.gpu_hours'?"),
    ("budget.split", {"x": 1}, "split has a share for 'x'"),
    ("run.folder", 5, "run.folder is 5: it must be text"),
    ("run.folder", "/proc/nope", "cannot be written to"),
    ("run.foldr", "x", "did you mean 'run.folder'?"),
    ("reconstruction.learning_rate", math.nan, "learning_rate of the reconstruction is nan"),
    ("quantization.kind", "2bit", "it must be one of 'nf4', 'int8'"),
    ("control", "maybe", "control is 'maybe': it must be true or false"),
    ("nope", 1, "there is no setting nope"),
    ("model", ..., "model is required"),
    ("model", 5, "model is 5"),
    ("model", "Nope", "it must be the path of a class"),
    ("model.class_path", "sparsefit.modules.CausalLMModul", "did you mean 'CausalLMModule'?"),
    ("model.class_path", "nope.Nope", "No module named 'nope'"),
    ("model.class_path", "torch.nn.Linear", "torch.nn.Linear is not a LightningModule"),
    ("model.init_args", 5, "CausalLMModule cannot be used"),
    ("model.init_args.model", ..., "CausalLMModule needs model"),
    ("model.init_args.model", ".", "holds no config.json"),
    ("model.init_args.learning_rate", math.nan, "learning_rate is nan: it must be a number above 0"),
    ("model.init_args.learning_rate", "fast", "model.learning_rate is 'fast': it must be a number"),
    ("model.init_args.learning_rat", 1, "did you mean 'learning_rate'?"),
    ("model.init_args.weight_decay", math.inf, "weight_decay is inf"),
    ("model.init_args.optimizer", "sgd", "it must be one of 'adamw', 'adamw_8bit'"),
    ("model.init_args.adapter.r", "x", "model.adapter.r is 'x': it must be a whole number"),
    ("model.init_args.adapter.rr", 5, "AdapterSettings: there is no setting rr"),
    ("model.init_args.adapter", 5, "it must be settings of AdapterSettings"),
    ("model.init_args.adapter.target_modules", 5, "it must be text or a list"),
    ("data", ..., "data is required"),
    ("data.class_path", "sparsefit.modules.CausalLMModule", "is not a LightningDataModule"),
    ("data.init_args.tokenizer", ..., "TextFilesDataModule needs tokenizer"),
    ("data.init_args.train_source", "nope.txt", "there is no file nope.txt"),
    ("data.init_args.train_source", 5, "data.train_source is 5"),
    ("data.init_args.sequence_length", 2.5, "data.sequence_length is 2.5"),
    ("data.init_args.num_workers", -1, "num_workers is -1"),
    ("data.init_args.seed", -1, "seed is -1"),
    ("data.init_args.calibration", "nope", "it must be one of 'crop', 'pack'"),
]


def one_sentence(errors: str) -> bool:
    name, _, rest = errors.partition(": ")
    return name.endswith("Error") and bool(rest) and "usage:" not in errors and "Traceback" not in errors


@pytest.mark.parametrize(("path", "value", "words"), RECIPES, ids=[f"{path}={value!r}" for path, value, _ in RECIPES])
def test_a_wrong_setting_of_a_recipe(sparsefit, recipe, path, value, words):
    place = recipe
    *parts, last = path.split(".")
    for part in parts:
        place = place.setdefault(part, {})
    if value is ...:
        del place[last]
    else:
        place[last] = value
    status, _, errors = sparsefit("fit", recipe=recipe)
    assert status == 2
    assert one_sentence(errors)
    assert words in errors


# Command lines; files of these names are there.
LINES = [
    ("fit", "model is required"),
    ("fit --config nothing.yaml", "nothing.yaml"),
    ("fit --config folder", "folder"),
    ("fit --config latin.yaml", "latin.yaml"),
    ("fit --config broken.yaml", "broken.yaml"),
    ("fit --config list.yaml", "list.yaml"),
    ("fit --config empty.yaml", "empty.yaml has no settings"),
    ("fit --config recipe.yaml --model.init_args.learning_rate fast", "model.learning_rate is 'fast'"),
    ("fit --config recipe.yaml --model.init_args.nope 5", "nope"),
    ("fit --config recipe.yaml --model.learning_rat 5", "learning_rat"),
    ("fit --config recipe.yaml --pruning.sparsty 0.5", "did you mean 'pruning.sparsity'?"),
    ("fit --config recipe.yaml --pruning.sparsity", "pruning.sparsity"),
    ("fit --config recipe.yaml stray", "stray"),
    ("prune --config recipe.yaml --trainer.max_steps 5 --nope", "nope"),
    ("prune --config recipe.yaml --model.init_args.model spoiled", "spoiled"),
    ("prune --config recipe.yaml --model.init_args.model recipe.yaml", "recipe.yaml"),
    ("study", "study.folder"),
    ("study --config nothing.yaml", "nothing.yaml"),
    ("study --config latin.yaml", "latin.yaml"),
    ("study --config recipe.yaml", "there is no setting"),
    ("study --grid.sparsty 0.5", "did you mean"),
    ("study --study.folder out --seed_everything x", "seed_everything"),
    ("evaluate", "model"),
    ("evaluate folder", "nothing to evaluate"),
    ("evaluate folder --perplexity text.txt", "config.json"),
    ("evaluate nothing --perplexity text.txt", "nothing"),
    ("evaluate spoiled --perplexity text.txt", "spoiled"),
    ("evaluate model --perplexity nothing.txt", "there is no file nothing.txt"),
    ("evaluate model --perplexity latin.yaml", "latin.yaml"),
    ("evaluate model --perplexity text.txt --length x", "invalid int value: 'x'"),
    ("evaluate model --perplexity text.txt --length -3", "--length"),
    ("evaluate model --perplexity text.txt --batch-size 0", "batch_size"),
    ("evaluate model --perplexity text.txt --dtype int3", "int3"),
    ("evaluate model --perplexity text.txt --device quantum", "quantum"),
    ("evaluate model --perplexity text.txt --output folder", "folder"),
    ("evaluate model --perplexity text.txt --lenght 5", "did you mean 'length'?"),
    ("inspect", "folder"),
    ("inspect nothing", "there is no folder"),
    ("inspect recipe.yaml", "recipe.yaml"),
    ("inspect folder", "holds no saved model"),
    ("inspect spoiled", "spoiled"),
    ("inspect damaged", "damaged"),
    ("inspect model --nope", "nope"),
    ("merge", "run"),
    ("merge nothing", "there is no run folder"),
    ("merge folder", "no adapter"),
    ("merge recipe.yaml", "recipe.yaml"),
    ("speed", "folder"),
    ("speed nothing", "there is no folder"),
    ("speed folder", "holds no saved model"),
    ("speed model --repeats 0", "--repeats is 0"),
    ("export model --format onnx", "--output"),
    ("export nothing --output out --format onnx", "there is no folder"),
    ("export model --output out --format zip", "invalid choice: 'zip'"),
    ("export model --output folder --format onnx", "exists and is not an empty folder"),
    ("export recipe.yaml --output out --format onnx", "recipe.yaml"),
]


@pytest.fixture
def files(tmp_path, recipe, model):
    """Good files and bad ones, by the names that the command lines have."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "latin.yaml").write_bytes("name: Käse\n".encode("latin-1"))
    (tmp_path / "broken.yaml").write_text("model: [unclosed\n")
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "text.txt").write_text("a text of a few words " * 20)
    (tmp_path / "model").symlink_to(model)
    for name in ("folder", "spoiled", "damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / "folder/file").write_text("x")
    (tmp_path / "spoiled/config.json").write_text('{"model_type": "llama", ')
    (tmp_path / "damaged/model.safetensors").write_bytes(b"no tensors")


@pytest.mark.parametrize(("line", "words"), LINES, ids=[line for line, _ in LINES])
def test_a_wrong_command_line(sparsefit, files, line, words):
    status, _, errors = sparsefit(*line.split())
    assert status == 2
    assert one_sentence(errors)
    assert words in errors
