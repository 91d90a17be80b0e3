"""Which matrices are pruned: output layers, layers without data, routers, names; and the reasons for the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moe import SIZES
from torch import Tensor, nn

from sparsefit import PruningConfig, collect_statistics, prune, prune_from_statistics
from sparsefit.errors import ConfigError
from sparsefit.pruning.config import matches
from sparsefit.pruning.heads import output_layers

IDS = torch.randint(1, 61, (3, 9), generator=torch.Generator().manual_seed(0))


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def transformers_model(family: str, head: str, **settings: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**settings)
    return getattr(transformers, f"{family}{head}")(config).eval()


def vgg() -> nn.Module:
    class VGG(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
            hidden = nn.Linear(8, 16)
            self.classifier = nn.Sequential(
                hidden, nn.ReLU(), nn.Dropout(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.features(x).mean((2, 3)))

    return VGG()


class Named(nn.Module):
    """A network whose last layer has a name of its own."""

    def __init__(self, name: str, last: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU())
        self.name = name
        self.add_module(name, last)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.name)(self.body(x))


class TwoHeads(Named):
    """Returns two outputs, the first layer of which is defined before the body is used."""

    def __init__(self) -> None:
        super().__init__("mean", nn.Linear(12, 2))
        self.spread = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.body(x)
        return {"mean": self.mean(hidden), "spread": nn.functional.softplus(self.spread(hidden))}


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.encode = nn.Embedding(61, 8), nn.LSTM(8, 8, batch_first=True)
        self.decoder = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(self.encode(self.embed(ids))[0])


HEADS = {
    "fc": (lambda: Named("fc", nn.Linear(12, 4)), rows(5, 6), {"fc.weight"}),
    "out": (lambda: Named("out", nn.Linear(12, 4)), rows(5, 6), {"out.weight"}),
    "sequential": (lambda: Named("top", nn.Sequential(nn.Dropout(), nn.Linear(12, 4))), rows(5, 6), {"top.1.weight"}),
    "hidden layer in the head": (
        lambda: Named("score", nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))),
        rows(5, 6),
        {"score.2.weight"},
    ),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)),
        rows(2, 3, 8, 8),
        {"2.weight"},
    ),
    "vgg": (vgg, rows(2, 3, 12, 12), {"classifier.5.weight"}),
    "two heads": (TwoHeads, rows(5, 6), {"mean.weight", "spread.weight"}),
    "decoder of a tagger": (Tagger, IDS, {"decoder.weight"}),
}


@pytest.mark.parametrize(("make", "data", "heads"), HEADS.values(), ids=HEADS)
def test_what_leads_to_the_output_stays_dense_by_any_name(make, data, heads):
    model = make()
    result = prune(model, [data])
    assert {name for name, reason in result.left_dense.items() if reason == "output layer"} == heads
    others = {name for name, p in model.named_parameters() if p.ndim > 1} - heads - set(result.left_dense)
    assert set(result.masks) == others


@pytest.mark.parametrize(
    ("make", "heads"), [(make, heads) for name, (make, _, heads) in HEADS.items() if name != "two heads"]
)
def test_without_data_the_last_matrix_is_taken_for_the_head(make, heads):
    result = prune(make(), None, PruningConfig(score="magnitude"))
    assert {name for name, reason in result.left_dense.items() if reason == "output layer"} == heads


TRANSFORMERS = {
    "causal": ("Llama", "ForCausalLM", SIZES, {"lm_head.weight"}),
    "classifier": ("Bert", "ForSequenceClassification", SIZES, {"classifier.weight"}),
    "token classifier": ("Bert", "ForTokenClassification", SIZES, {"classifier.weight"}),
    "score": ("Llama", "ForSequenceClassification", SIZES, {"score.weight"}),
    "questions": ("Bert", "ForQuestionAnswering", SIZES, {"qa_outputs.weight"}),
    "no head": ("Llama", "Model", SIZES, set()),
}


@pytest.mark.parametrize(("family", "head", "settings", "heads"), TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_heads_of_transformers_models_are_found_with_data_and_without(family, head, settings, heads):
    model = transformers_model(family, head, **settings)
    found = prune(model, [{"input_ids": IDS}]).left_dense
    assert {name for name, reason in found.items() if reason == "output layer"} == heads
    assert output_layers(model) - {"model.embed_tokens.weight"} >= heads


def test_a_head_is_pruned_where_it_is_named_or_all_there_is():
    model = Named("fc", nn.Linear(12, 4))
    assert list(prune(model, [rows(5, 6)], PruningConfig(targets=["fc"])).masks) == ["fc.weight"]
    assert list(prune(nn.Linear(6, 4), [rows(5, 6)]).masks) == ["weight"]


def test_adapters_on_all_linear_layers_leave_out_the_same_head():
    from sparsefit import AdapterSettings, attach_adapter

    wrapped = attach_adapter(
        Named("score", nn.Sequential(nn.ReLU(), nn.Linear(12, 4))), AdapterSettings(target_modules="all-linear")
    )
    adapted = {
        name.removesuffix(".lora_A.default.weight") for name, _ in wrapped.named_parameters() if "lora_A" in name
    }
    assert adapted == {"base_model.model.body.0", "base_model.model.body.2"}


class Distilled(nn.Module):
    """A student, a frozen teacher, a copy with moving averages, and a loss network: only the student is called."""

    def __init__(self, deep_teacher: bool = True) -> None:
        super().__init__()
        self.student = transformers_model("Llama", "ForCausalLM", **SIZES)
        self.teacher = transformers_model("Llama", "ForCausalLM", **(SIZES | {"hidden_size": 32}))
        self.average = nn.Linear(16, 16)
        self.loss = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))

    def forward(self, input_ids: Tensor) -> Tensor:
        # A dtype or a device that is asked for does not reach a weight.
        return self.student(input_ids).logits.to(self.average.weight.dtype)


@pytest.mark.parametrize("settings", [{}, {"update": "none"}, {"score": "magnitude"}, {"swaps": 2}], ids=str)
def test_what_calibration_does_not_reach_is_left_dense_and_costs_nobody_the_block_order(settings):
    model = Distilled()
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = prune(model, [{"input_ids": IDS}], PruningConfig(**settings))
    assert all(name.startswith("student.model.layers.") for name in result.masks)
    assert len(result.masks) == 14
    assert result.update == ("none" if settings.get("update") or settings.get("score") else "block")
    unreached = {name for name, reason in result.left_dense.items() if reason == "not reached by the calibration data"}
    assert {name.partition(".")[0] for name in unreached} == {"teacher", "average", "loss"}
    for name, p in model.named_parameters():
        assert name in result.masks or torch.equal(p, dense[name]), name
    alone = transformers_model("Llama", "ForCausalLM", **SIZES)
    own = prune(alone, [{"input_ids": IDS}], PruningConfig(**settings))
    assert own.masks.digest() == result.masks.renamed(lambda name: name.removeprefix("student.")).digest()


def test_what_only_some_batches_reach_is_pruned():
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text, self.image, self.top = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, text: Tensor, image: Tensor | None = None) -> Tensor:
            hidden = self.text(text)
            return self.top(hidden if image is None else hidden + self.image(image))

    batches = [{"text": rows(3, 6)}, {"text": rows(3, 6), "image": rows(3, 4)}]
    assert set(prune(Either(), batches).masks) == {"text.weight", "image.weight"}
    assert set(prune(Either(), batches[:1]).masks) == {"text.weight"}


def test_targets_that_nothing_reaches_are_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"no prunable weights.*not reached by the calibration data"):
        prune(Distilled(), [{"input_ids": IDS}], PruningConfig(targets=["teacher"]))


def test_an_expert_without_tokens_next_to_others_is_pruned_all_the_same():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(6, 3)
            self.experts = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
            self.top = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.top(self.experts[0](x) + self.experts[1](x) * self.gate(x).max())

    result = prune(Experts(), [rows(7, 6)])
    assert set(result.masks) == {f"experts.{index}.weight" for index in range(3)}
    assert result.left_dense == {"gate.weight": "router of experts", "top.weight": "output layer"}
    assert any("experts.2.weight" in note and "magnitude" in note for note in result.notes)


ROUTERS = {
    "Phimoe": ({"num_local_experts": 4}, {"router"}),
    "JetMoe": ({"num_local_experts": 4, "kv_channels": 8}, {"router.layer"}),
    "HunYuanMoEV1": ({"num_experts": 4, "head_dim": 8}, {"gate.wg"}),
    "Qwen2Moe": (
        {"num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12},
        {"shared_expert_gate"},
    ),
}


def moe_model(family: str, settings: dict[str, Any]) -> nn.Module:
    return transformers_model(family, "ForCausalLM", **(SIZES | settings))


def llama4() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(**SIZES, num_local_experts=4, head_dim=8, intermediate_size_mlp=24)
    return transformers.Llama4ForCausalLM(config).eval()


@pytest.mark.parametrize("family", [*ROUTERS, "Llama4"])
def test_routers_stay_dense_unless_they_are_named(family):
    settings, endings = ROUTERS.get(family, ({}, {"router"}))
    make = llama4 if family == "Llama4" else lambda: moe_model(family, settings)
    result = prune(make(), [{"input_ids": IDS}], PruningConfig(update="none"))
    kept = {name for name, reason in result.left_dense.items() if reason == "router of experts"}
    assert kept
    assert all(name.endswith(tuple(f"{ending}.weight" for ending in endings)) for name in kept)
    assert any("expert" in name or "input_linear" in name for name in result.masks)
    named = prune(make(), [{"input_ids": IDS}], PruningConfig(update="none", targets=endings))
    assert set(named.masks) == kept


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("q_proj", "model.layers.0.q_proj", True),
        ("proj", "model.layers.0.q_proj", False),
        ("mlp.down_proj", "layers.1.mlp.down_proj", True),
        ("vision_tower", "model.vision_tower.layers.0.fc1", True),
        ("vision", "model.vision_tower.layers.0.fc1", False),
        ("layers.1", "layers.10.fc", False),
        ("layers.[0-3]", "model.layers.2", True),
        ("*.mlp.*", "model.layers.2.mlp.fc1", True),
        ("layers.*.fc?", "model.layers.2.mlp.fc1", True),
        ("fc?", "model.fc12", False),
        (r"re:layers\.[13]\.", "model.layers.3.fc", True),
        (r"re:layers\.[13]\.", "model.layers.13.fc", False),
        ("re:^fc", "model.fc", False),
    ],
)
def test_names_of_layers_and_modules_globs_and_regular_expressions(pattern, name, fits):
    assert matches(name, [pattern]) is fits


@pytest.mark.parametrize("form", [list, tuple, set, frozenset, iter], ids=lambda form: form.__name__)
def test_targets_in_any_collection(form):
    config = PruningConfig(targets=form(["body.0", "re:fc$"]), exclude=form(["2"]))
    assert set(config.targets) == {"body.0", "re:fc$"}
    assert set(prune(Named("fc", nn.Linear(12, 4)), [rows(5, 6)], config).masks) == {"body.0.weight", "fc.weight"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"targets": ["re:("]}, r"'re:\(' is no regular expression"),
        ({"exclude": {"a": 1}}, "exclude must be a list of layer names"),
        ({"targets": 5}, "targets must be a list of layer names"),
        ({"target": ["fc"]}, "no setting 'target': did you mean 'targets'"),
        ({"existing_zeros": "hold"}, "unknown existing_zeros 'hold'; the choices are keep, adopt, ignore"),
    ],
)
def test_names_that_cannot_work_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        PruningConfig(**settings)


def test_coverage_is_reported_and_what_stayed_dense():
    model = Named("fc", nn.Linear(12, 500))
    result = prune(model, [rows(5, 6)])
    pruned, all_of_them = 6 * 12 + 12 * 12, 6 * 12 + 12 * 12 + 12 * 500
    zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.ndim > 1)
    assert result.masks.sparsity == 0.5
    assert result.coverage == pytest.approx(pruned / all_of_them)
    assert result.overall_sparsity == pytest.approx(zeros / all_of_them)
    (note,) = [note for note in result.notes if "only 3.5% of the weights" in note]
    assert "96.5% output layer (fc.weight)" in note
    assert "`targets`" in note
    whole = prune(Named("fc", nn.Linear(12, 500)), [rows(5, 6)], PruningConfig(targets="*"))
    assert whole.coverage == 1.0
    assert whole.overall_sparsity == 0.5
    assert not [note for note in whole.notes if "of the weights" in note]


def test_zeros_of_dense_matrices_are_counted_too():
    model = Named("fc", nn.Linear(12, 500))
    nn.init.zeros_(model.fc.weight)
    assert prune(model, [rows(5, 6)]).overall_sparsity == pytest.approx((108 + 6000) / 6216)


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_counts_as_a_matrix_where_it_is_the_output_layer(tied):
    model = transformers_model("Llama", "ForCausalLM", **(SIZES | {"vocab_size": 611, "tie_word_embeddings": tied}))
    result = prune(model, [{"input_ids": IDS}])
    pruned = sum(mask.numel() for _, mask in result.masks.items())
    assert result.coverage == pytest.approx(pruned / (pruned + 611 * 16))
    assert result.coverage < 0.5
    assert any("output layer" in note and "lm_head.weight" in note for note in result.notes)


def test_statistics_of_another_model_are_refused_before_a_weight_changes():
    config = PruningConfig(update="none")
    torch.manual_seed(0)
    model, other = Named("fc", nn.Linear(12, 4)), Named("fc", nn.Linear(12, 4))
    statistics = collect_statistics(model, [rows(5, 6)], [config])
    dense = {name: p.detach().clone() for name, p in other.named_parameters()}
    with pytest.raises(ConfigError, match="of another model"):
        prune_from_statistics(other, statistics, config)
    assert all(torch.equal(p, dense[name]) for name, p in other.named_parameters())
    prune_from_statistics(model, statistics, config)
    with pytest.raises(ConfigError, match="changed since"):
        prune_from_statistics(model, statistics, config)
