from __future__ import annotations

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sparsefit.errors import DataError, SparsefitError
from sparsefit.evaluation import perplexity
from sparsefit.recovery.adapters import AdapterSettings, attach_adapter


def llama(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, initializer_range=0.5, **sizes))
    return model.eval()


def gpt2():
    torch.manual_seed(0)
    # default dropout of 0.1: only an evaluation mode gives the reference's losses
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_head=2, n_layer=2, initializer_range=0.5)).train()


def batches(*sizes, length=12):
    random = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(50, (size, length), generator=random)} for size in sizes]


@torch.no_grad()
def reference(model, batches):
    """Token by token, in float64."""
    losses = []
    for batch in batches:
        for row, ids in enumerate(batch["input_ids"]):
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[row]
            labels = batch.get("labels", batch["input_ids"])[row]
            logits = model(input_ids=ids[None], attention_mask=mask[None]).logits[0].double()
            for place in range(len(ids) - 1):
                counts = labels[place + 1] != -100 and ("labels" in batch or mask[place + 1])
                if counts:
                    scores = logits[place] - logits[place].max()
                    losses.append(float(scores.exp().sum().log() - scores[labels[place + 1]]))
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("sizes", [(1,), (3, 1), (2, 2, 2)])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_it_agrees_with_a_slow_reference(build, sizes):
    model = build()
    found = perplexity(model, batches(*sizes))
    assert found == pytest.approx(reference(model.eval(), batches(*sizes)), rel=1e-5)


def test_the_batch_size_does_not_matter():
    rows = batches(5)[0]["input_ids"]
    split = [{"input_ids": rows[:2]}, {"input_ids": rows[2:]}]
    assert perplexity(llama(), split) == pytest.approx(perplexity(llama(), [{"input_ids": rows}]), rel=1e-6)


def test_masked_positions_and_labels_do_not_count():
    (batch,) = batches(3)
    mask = torch.ones_like(batch["input_ids"])
    mask[1, 8:] = mask[2, 5:] = 0
    masked = batch | {"attention_mask": mask}
    assert perplexity(llama(), [masked]) == pytest.approx(reference(llama(), [masked]), rel=1e-5)
    labelled = batch | {"labels": batch["input_ids"].masked_fill(torch.arange(12) < 6, -100)}
    assert perplexity(llama(), [labelled]) == pytest.approx(reference(llama(), [labelled]), rel=1e-5)
    assert perplexity(llama(), [labelled]) != pytest.approx(perplexity(llama(), [batch]), rel=1e-3)


def test_losses_are_float32_in_a_half_precision_model():
    model = llama().to(torch.bfloat16)
    assert perplexity(model, batches(2)) == pytest.approx(reference(model, batches(2)), rel=1e-5)


def test_adapters_count():
    model = attach_adapter(llama(), AdapterSettings())
    before = perplexity(model, batches(2))
    assert before == pytest.approx(perplexity(llama(), batches(2)), rel=1e-6)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    after = perplexity(model, batches(2))
    assert after == pytest.approx(reference(model.eval(), batches(2)), rel=1e-5)
    assert after != pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("fails", [False, True])
def test_each_module_is_back_in_its_own_mode(fails):
    model = gpt2()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    during = []
    model.lm_head.register_forward_hook(lambda *_: during.extend(module.training for module in model.modules()))
    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            perplexity(model, batches(1), lambda _: (_ for _ in ()).throw(RuntimeError("stop")))
    else:
        perplexity(model, batches(1))
    assert during
    assert not any(during)
    assert [module.training for module in model.modules()] == before
    assert len(set(before)) == 2


def test_it_tells_its_progress_and_keeps_no_graph():
    done = []
    model = llama()
    perplexity(model, batches(1, 1, 1), done.append)
    assert done == [1, 2, 3]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_outputs_that_are_not_finite_are_named():
    model = llama()
    model.model.norm.weight.data[0] = math.nan
    with pytest.raises(SparsefitError, match="the loss of batch 1 is nan"):
        perplexity(model, batches(1))


@pytest.mark.parametrize("text", [[], [{"input_ids": torch.zeros(2, 1, dtype=torch.int64)}]])
def test_no_text_is_an_error(text):
    with pytest.raises(DataError, match="no text to evaluate on"):
        perplexity(llama(), text)


def test_the_loss_is_that_of_transformers():
    model, (batch,) = llama(), batches(4)
    with torch.no_grad():
        loss = model(**batch, labels=batch["input_ids"]).loss
    assert perplexity(model, [batch]) == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.slow
def test_a_pretrained_model_on_its_own_domain(shared_data):
    from sparsefit.data import TextFilesDataModule, WikiTextDataModule
    from sparsefit.modules.loading import load_causal_lm

    name = str(shared_data / "tinystories656K")
    model = load_causal_lm(name)
    settings = {"sequence_length": 512, "test_windows": 12, "batch_size": 4}
    stories = f"{shared_data}/tinystories/val.jsonl"
    stories = TextFilesDataModule(name, stories, test_source=stories, **settings).test_dataloader()
    wiki = WikiTextDataModule(name, test_source=f"{shared_data}/wikitext2/test_raw.txt", **settings).test_dataloader()
    assert 30 < perplexity(model, stories) < 55
    assert 400 < perplexity(model, wiki) < 1100
