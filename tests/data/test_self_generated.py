"""Text that a model writes itself: what it is drawn from, what begins it, and the files that keep it."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from written_text import END, data_of, windows, written

from sparsefit.data.data_position import Place
from sparsefit.errors import CalibrationError, ConfigError, DataError
from sparsefit.modules.text_generation import sample_windows, weights_digest, writing
from sparsefit.recovery.adapters import AdapterSettings, attach_adapter


@pytest.fixture
def model(tiny_model):
    return tiny_model("llama", vocab_size=257)


def distances(counts, probabilities):
    """How many standard deviations each count is away from what is expected of it."""
    total = counts.sum()
    return ((counts - total * probabilities) / (total * probabilities * (1 - probabilities)).sqrt()).abs()


# What is drawn.


def test_tokens_are_drawn_from_the_models_own_distribution_whatever_it_was_published_with(tiny_model):
    model = tiny_model("llama")
    with torch.no_grad():  # so that no token is rare
        model.lm_head.weight.mul_(0.1)
    # Each of these would change what `generate` draws.
    published = {"temperature": 0.1, "top_k": 2, "top_p": 0.3, "repetition_penalty": 5.0, "suppress_tokens": [5]}
    published |= {"do_sample": True, "eos_token_id": 2, "max_length": 3}
    for name, value in published.items():
        setattr(model.generation_config, name, value)
    with writing(model):
        drawn = sample_windows(model, torch.tensor([[1]] * 30_000), 3, seed=0)
    assert drawn.shape == (30_000, 3)
    assert drawn.dtype == torch.int64
    with torch.no_grad():
        first = model(torch.tensor([[1]])).logits[0, -1].softmax(-1)
        second = model(torch.stack([torch.ones(61, dtype=torch.int64), torch.arange(61)], dim=1)).logits[:, -1]
    assert distances(torch.bincount(drawn[:, 1], minlength=61), first).max() < 4.5
    # All second tokens together, and those after the token that ends a text.
    both = (first[:, None] * second.softmax(-1)).sum(0)
    assert distances(torch.bincount(drawn[:, 2], minlength=61), both).max() < 4.5
    after_end = drawn[drawn[:, 1] == 2, 2]
    assert len(after_end) > 100
    assert distances(torch.bincount(after_end, minlength=61), second[2].softmax(-1)).max() < 5
    assert model.generation_config.temperature == 0.1


def test_temperature_and_top_p(model):
    starts = torch.tensor([[END]] * 200)
    with torch.no_grad():
        probabilities, order = model(starts[:1]).logits[0, -1].softmax(-1).sort(descending=True)
    nucleus = set(order[: int((probabilities.cumsum(0) < 0.5).sum()) + 1].tolist())
    with writing(model):
        assert set(sample_windows(model, starts, 2, 0, temperature=1e-4)[:, 1].tolist()) == {int(order[0])}
        assert set(sample_windows(model, starts, 2, 0, top_p=0.5)[:, 1].tolist()) <= nucleus
        assert not set(sample_windows(model, starts, 2, 0)[:, 1].tolist()) <= nucleus


def test_writing_leaves_model_and_random_numbers_as_they_were(model, tokenizer, tmp_path):
    model.train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    before = {name: module.training for name, module in model.named_modules()}
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    data_of(tokenizer, tmp_path).write_with(model)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("form", ["lora", "masked_lora"])
def test_adapters_write_nothing_and_are_no_part_of_the_digest(model, tokenizer, tmp_path, form):
    bare = written(tokenizer, tmp_path / "bare", copy.deepcopy(model))
    digest = weights_digest(model)
    adapted = attach_adapter(model, AdapterSettings(form=form, r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name:
                parameter.fill_(0.1)
    trained = {name: p.requires_grad for name, p in adapted.named_parameters()}
    assert written(tokenizer, tmp_path / "adapted", adapted) == bare
    assert weights_digest(adapted) == digest
    assert {name: p.requires_grad for name, p in adapted.named_parameters()} == trained


def test_logits_that_are_not_finite_are_reported(model):
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with writing(model), pytest.raises(CalibrationError, match="not finite, so it cannot write"):
        sample_windows(model, torch.tensor([[END]]), 3, 0)


# What is written.


def test_text_is_of_the_size_asked_for_and_repeats_with_its_seed(tokenizer, tmp_path, model):
    calibration, training = written(tokenizer, tmp_path / "a", model)
    assert (len(calibration), len(training)) == (5, 9)  # 100 tokens are 8 windows and a part
    assert {len(window) for window in calibration + training} == {12}
    assert {window[0] for window in calibration + training} == {END}  # this tokenizer has no token that begins a text
    assert len(set(calibration + training)) == 14
    assert written(tokenizer, tmp_path / "b", model) == (calibration, training)
    other = written(tokenizer, tmp_path / "c", model, seed=1)
    assert not set(other[0] + other[1]) & set(calibration + training)


def test_calibration_windows_of_another_length(tokenizer, tmp_path, model):
    calibration, training = written(tokenizer, tmp_path, model, calibration_length=20)
    assert {len(window) for window in calibration} == {20}
    assert {len(window) for window in training} == {12}


def test_the_likeliest_first_tokens_begin_windows_in_turn(tokenizer, tmp_path, model):
    with torch.no_grad():
        likeliest = model(torch.tensor([[END]])).logits[0, -1].topk(4).indices.tolist()
    calibration, _ = written(tokenizer, tmp_path, model, first_tokens=4)
    assert [window[:2] for window in calibration] == [(END, likeliest[number % 4]) for number in range(5)]


def test_prompts_begin_windows(tokenizer, corpus, tmp_path, model):
    calibration, training = written(tokenizer, tmp_path, model, prompts=f"{corpus}[:20]", prompt_tokens=6)
    begun = [tokenizer.decode(window[:6]) for window in calibration + training]
    assert all(text == f"{text[:3]} {text[:2]}" and int(text[:3]) < 20 for text in begun)
    assert len(set(begun)) > 5
    with pytest.raises(ConfigError, match="prompt_tokens is 12, and a window has only 12"):
        written(tokenizer, tmp_path, model, prompts=str(corpus), prompt_tokens=12)
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(DataError, match="no document of the prompts has 11 tokens"):
        written(tokenizer, tmp_path, model, prompts=str(tmp_path / "short.txt"), prompt_tokens=11)


def test_real_text_may_take_the_place_of_either(tokenizer, corpus, tmp_path, model):
    real = set(corpus.read_text())
    calibration, training = written(tokenizer, tmp_path / "a", model, train_source=str(corpus), calibration="pack")
    assert calibration == written(tokenizer, tmp_path / "b", model)[0]
    assert set(tokenizer.decode(sum(training, ())).replace("<end>", "")) <= real
    data = data_of(tokenizer, tmp_path / "c", calibration_source=str(corpus), calibration="pack")
    data.write_with(model)
    assert set(tokenizer.decode(sum(windows(data.calibration_dataloader()), ())).replace("<end>", "")) <= real
    assert [file.name.partition("-")[0] for file in (tmp_path / "c").glob("*.npy")] == ["training"]


def test_evaluation_is_on_real_text_or_none(tokenizer, corpus, tmp_path):
    data = data_of(tokenizer, tmp_path, test_source=str(corpus), val_source=str(corpus))
    assert windows(data.test_dataloader())
    assert windows(data.val_dataloader())
    bare = data_of(tokenizer, tmp_path)
    assert bare.test_dataloader() is None
    assert bare.val_dataloader() == []


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_and_workers_share_the_windows_out_in_another_order_each_epoch(
    tokenizer, tmp_path, model, world_size, workers, monkeypatch
):
    data = data_of(tokenizer, tmp_path, num_workers=workers, batch_size=1)
    data.write_with(model)
    training = {tuple(row) for row in data._of("training").read().tolist()}
    epochs = []
    for epoch in range(2):
        monkeypatch.setattr(data, "position", lambda epoch=epoch: Place(epoch, 0))
        shares = []
        for rank in range(world_size):
            monkeypatch.setattr(data, "rank_and_world_size", lambda rank=rank: (rank, world_size))
            shares.append(windows(data.train_dataloader()))
        assert len({len(share) for share in shares}) == 1
        together = [window for share in shares for window in share]
        assert len(together) == len(set(together)) >= len(training) - world_size * max(1, workers) + 1
        assert set(together) <= training
        epochs.append(shares)
    assert epochs[0] != epochs[1]


# What cannot work.


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_a_model_that_cannot_write(tokenizer, tmp_path, tiny_model, kind):
    with pytest.raises(ConfigError, match="cannot write its own text"):
        written(tokenizer, tmp_path, tiny_model(kind))
    assert not list(tmp_path.iterdir())


def test_a_module_without_a_model_of_transformers(tokenizer, tmp_path):
    module = LightningModule()
    module.net = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="LightningModule cannot write its own text"):
        written(tokenizer, tmp_path, module)


def test_windows_longer_than_the_model_can_write(tokenizer, tmp_path, model):
    with pytest.raises(ConfigError, match="has 64 positions, and is to write windows of 65 tokens"):
        written(tokenizer, tmp_path, model, calibration_length=65)


def test_text_that_is_not_written_yet(tokenizer, tmp_path):
    data = data_of(tokenizer, tmp_path)
    for loader in (data.calibration_dataloader, data.train_dataloader):
        with pytest.raises(ConfigError, match="text is not written yet: fit with it, or call write_with"):
            loader()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_tokens": 0}, "train_tokens is 0"),
        ({"writing_batch_size": 0}, "writing_batch_size is 0"),
        ({"prompt_tokens": 0}, "prompt_tokens is 0"),
        ({"first_tokens": -1}, "first_tokens is -1"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"prompts": "a.txt", "first_tokens": 2}, "not with both"),
        ({"train_source": "a.txt", "calibration_source": "b.txt"}, "nothing to write"),
        ({"calibration_samples": 0}, "calibration_samples is 0"),
    ],
)
def test_settings_that_cannot_work(tokenizer, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        data_of(tokenizer, tmp_path, **settings)
