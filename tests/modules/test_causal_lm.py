from __future__ import annotations

import math
import sys
import warnings

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from sparsefit import PruningConfig, prune
from sparsefit.data import TextDataModule
from sparsefit.errors import ConfigError
from sparsefit.modules.causal_lm import CausalLMModule
from sparsefit.recovery.adapters import AdapterSettings
from sparsefit.recovery.mask_guard import MaskGuard

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def llama(layers=2):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))


def batches(count=6, size=4):
    random = torch.Generator().manual_seed(0)
    rows = torch.randint(10, (count * size, 12), generator=random)
    return DataLoader([{"input_ids": row} for row in rows], batch_size=size)


def weights(module):
    return {name: parameter.detach().clone() for name, parameter in module.model.named_parameters()}


def fit(module, folder, **settings):
    trainer = Trainer(default_root_dir=folder, **QUIET | {"max_epochs": 3} | settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, batches(), batches(2, 3))
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", [None, AdapterSettings(dropout=0.0)])
def test_only_what_should_train_does_and_the_loss_falls(tmp_path, adapter, checkpointing):
    module = CausalLMModule(llama(), adapter, learning_rate=1e-2, gradient_checkpointing=checkpointing)
    before, start = weights(module), module.evaluate(batches())["perplexity"]
    trainer = fit(module, tmp_path)
    changed = {name for name, weight in weights(module).items() if not torch.equal(weight, before[name])}
    if adapter is None:
        assert changed == set(before)
    else:
        assert changed == {name for name in before if "lora_" in name}
        assert len(changed) == 8
    assert module.evaluate(batches())["perplexity"] < start
    metrics = trainer.callback_metrics
    assert {"train_loss", "val_loss", "val_perplexity"} <= set(metrics)
    assert float(metrics["val_perplexity"]) == pytest.approx(math.exp(metrics["val_loss"]), rel=1e-5)


def test_gradients_do_not_depend_on_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        module = CausalLMModule(llama(), AdapterSettings(dropout=0.0), gradient_checkpointing=checkpointing).train()
        for name, parameter in module.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.1)
        module.model(input_ids=next(iter(batches()))["input_ids"], labels=torch.ones(4, 12).long()).loss.backward()
        gradients.append([p.grad for p in module.parameters() if p.requires_grad])
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_validation_and_test_log_the_perplexity_that_evaluate_finds(tmp_path):
    module = CausalLMModule(llama())
    uneven = DataLoader(batches().dataset, batch_size=5)
    trainer = Trainer(default_root_dir=tmp_path, **QUIET)
    expected = module.evaluate(uneven)["perplexity"]
    (tested,) = trainer.test(module, uneven, verbose=False)
    (validated,) = trainer.validate(module, uneven, verbose=False)
    assert tested["test_perplexity"] == pytest.approx(expected, rel=1e-5)
    assert validated["val_perplexity"] == pytest.approx(expected, rel=1e-5)


def test_masked_positions_are_not_trained_on():
    module = CausalLMModule(llama()).eval()
    ids = torch.arange(12)[None]
    mask = (ids < 8).long()
    module.log = lambda *args, **kwargs: None
    padded = module.training_step({"input_ids": ids, "attention_mask": mask}, 0)
    torch.testing.assert_close(padded, module.training_step({"input_ids": ids[:, :8]}, 0))


def test_predicting_calls_the_model_without_labels():
    module = CausalLMModule(llama())
    calls = []
    module.model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(set(kwargs)), with_kwargs=True)
    batch = next(iter(batches()))
    out = module.predict_step(batch | {"labels": batch["input_ids"], "attention_mask": torch.ones(4, 12)})
    assert calls == [{"input_ids", "attention_mask"}]
    assert out.loss is None
    assert module(**batch).logits.shape == (4, 12, 50)


def test_evaluate_tells_its_progress():
    done = []
    CausalLMModule(llama()).evaluate(batches(3), done.append)
    assert done == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, AdapterSettings(r=2, target_modules=["q_proj"])])
def test_a_checkpoint_loads_with_weights_only(tmp_path, adapter):
    llama().save_pretrained(tmp_path / "model")
    module = CausalLMModule(str(tmp_path / "model"), adapter, learning_rate=1e-2)
    assert module.tokenizer is None
    trainer = fit(module, tmp_path)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["learning_rate"] == 1e-2
    again = CausalLMModule.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    expected = weights(module)
    assert weights(again).keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(again).items())
    assert again.hparams.adapter == module.hparams.adapter


def test_a_checkpoint_of_a_model_built_in_python(tmp_path):
    module = CausalLMModule(llama(), AdapterSettings())
    fit(module, tmp_path).save_checkpoint(tmp_path / "run.ckpt")
    again = CausalLMModule.load_from_checkpoint(tmp_path / "run.ckpt", model=llama(), weights_only=True)
    assert all(torch.equal(weight, weights(module)[name]) for name, weight in weights(again).items())


def test_settings_that_cannot_work():
    with pytest.raises(ConfigError, match="learning_rate is 0"):
        CausalLMModule(llama(), learning_rate=0)
    frozen = llama()
    frozen.requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter requires a gradient"):
        CausalLMModule(frozen).configure_optimizers()


# The 8-bit optimizer.


def wide_llama():
    """Weights large enough (4,096) for moments in 8 bits, and smaller ones."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))


def test_the_8bit_optimizer_trains_as_the_other_does(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no 8-bit optimizer")
    ends = {}
    for optimizer in ("adamw", "adamw_8bit"):
        module = CausalLMModule(wide_llama(), learning_rate=3e-3, weight_decay=0.01, optimizer=optimizer)
        start = module.evaluate(batches())["perplexity"]
        trainer = fit(module, tmp_path)
        assert module.hparams.optimizer == optimizer
        ends[optimizer] = module.evaluate(batches())["perplexity"]
        assert ends[optimizer] < start
    moments = {p.numel(): state["state1"].dtype for p, state in trainer.optimizers[0].state.items()}
    assert {dtype for size, dtype in moments.items() if size >= 4096} == {torch.uint8}
    assert {dtype for size, dtype in moments.items() if size < 4096} == {torch.float32}
    assert ends["adamw_8bit"] == pytest.approx(ends["adamw"], rel=0.05)


def test_full_training_with_the_8bit_optimizer_keeps_every_zero(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no 8-bit optimizer")
    adapter = AdapterSettings("full", target_modules="all-linear")
    module = CausalLMModule(wide_llama(), adapter, learning_rate=1e-2, weight_decay=0.1, optimizer="adamw_8bit")
    masks = prune(module, batches(), PruningConfig(score="magnitude")).masks
    kept = {name: matrix.clone() for name, matrix in masks.matrices_in(module)}
    optimizer = module.configure_optimizers()
    guard = MaskGuard(masks)
    assert guard.watch(module, [optimizer]) == len(masks)
    module.log = lambda *args, **kwargs: None
    for _ in range(2):
        for index, batch in enumerate(batches()):
            module.training_step(batch, index).backward()
            optimizer.step()
            optimizer.zero_grad()
            masks.verify(module)
    assert all(not torch.equal(matrix, kept[name]) for name, matrix in masks.matrices_in(module))


def test_a_run_with_the_8bit_optimizer_is_resumed_bit_for_bit(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no 8-bit optimizer")
    whole, resumed = (CausalLMModule(wide_llama(), learning_rate=3e-3, optimizer="adamw_8bit") for _ in range(2))
    fit(whole, tmp_path, max_epochs=1).save_checkpoint(tmp_path / "run.ckpt")
    torch.load(tmp_path / "run.ckpt", weights_only=True)
    for module in (whole, resumed):
        trainer = Trainer(default_root_dir=tmp_path, **QUIET, max_epochs=2)
        trainer.fit(module, batches(), ckpt_path=tmp_path / "run.ckpt")
    assert all(torch.equal(weight, weights(resumed)[name]) for name, weight in weights(whole).items())


def test_an_8bit_optimizer_that_cannot_be_had(monkeypatch):
    with pytest.raises(ConfigError, match="unknown optimizer 'sgd'"):
        CausalLMModule(llama(), optimizer="sgd")
    bitsandbytes = pytest.importorskip("bitsandbytes.optim", reason="bitsandbytes is not installed")
    module = CausalLMModule(llama(), optimizer="adamw_8bit")

    def no_kernel(self, closure=None):
        raise NotImplementedError("no kernel for the CPU")

    monkeypatch.setattr(bitsandbytes.AdamW8bit, "step", no_kernel)
    with pytest.raises(ConfigError, match="no 8-bit optimizer for the CPU: upgrade it"):
        module.configure_optimizers()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"pip install 'sparsefit\[quantized\]'"):
        CausalLMModule(llama(), optimizer="adamw_8bit")


class Rows(LightningDataModule):
    def train_dataloader(self):
        return batches()


@pytest.mark.slow
def test_it_is_configured_from_yaml(shared_data, tmp_path, monkeypatch):
    model = shared_data / "tinystories656K"
    config = tmp_path / "recipe.yaml"
    config.write_text(f"""
trainer: {{accelerator: cpu, logger: false, max_steps: 2, enable_progress_bar: false, enable_model_summary: false}}
model:
  class_path: sparsefit.modules.causal_lm.CausalLMModule
  init_args:
    model: {model}
    adapter: {{r: 4, target_modules: [q_proj, k_proj]}}
    learning_rate: 1.0e-3
data:
  class_path: sparsefit.data.C4DataModule
  init_args:
    tokenizer: {model}
    train_source:
      - {shared_data}/c4_sample/c4_train_1000.jsonl[:900]
    test_source: wikitext:{shared_data}/wikitext2/test_raw.txt
    sequence_length: 64
    batch_size: 2
    calibration_samples: 4
    seed: 3
""")
    monkeypatch.chdir(tmp_path)
    cli = LightningCLI(args=["fit", "--config", str(config)])
    assert isinstance(cli.datamodule, TextDataModule)
    assert cli.datamodule.hparams.seed == 3
    given = {"r": 4, "alpha": 16, "dropout": 0.05, "target_modules": ("q_proj", "k_proj")}
    assert {key: cli.model.hparams.adapter[key] for key in given} == given
    assert cli.trainer.global_step == 2
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    torch.load(checkpoint, weights_only=True)
    again = CausalLMModule.load_from_checkpoint(checkpoint, weights_only=True)
    assert torch.equal(again.model.get_input_embeddings().weight, cli.model.model.get_input_embeddings().weight)


def test_an_unknown_key_in_yaml_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        LightningCLI(CausalLMModule, Rows, run=False, args=["--model.model", "tiny-llama", "--model.lerning_rate", "1"])
    assert "lerning_rate" in capsys.readouterr().err
