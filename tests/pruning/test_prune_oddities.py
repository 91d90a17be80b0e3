"""Unusual models and scores: they are pruned correctly, or refused with the reason."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from sparsefit import PruningConfig, prune, register_score
from sparsefit.errors import CalibrationError, ConfigError
from sparsefit.pruning.scores import SCORES

IDS = torch.arange(3, 51).view(4, 12)


class TwoStreams(nn.Module):
    """A block that changes its hidden state and a second state."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, hidden: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        hidden = hidden + torch.tanh(self.a(hidden + 3 * context))
        return hidden, context * 2 + torch.tanh(self.b(hidden))


class Net(nn.Module):
    def __init__(self, blocks: list[nn.Module], context: bool = False) -> None:
        super().__init__()
        self.layers, self.context = nn.ModuleList(blocks), context

    def forward(self, hidden: Tensor) -> Tensor:
        state = (hidden, torch.ones_like(hidden)) if self.context else (hidden,)
        for layer in self.layers:
            state = layer(*state)
            state = state if isinstance(state, tuple) else (state,)
        return state[0]


def assert_same_choice(model: nn.Module, data: list, note: str) -> None:
    """Pruned with statistics of the dense network, and the note says why."""
    dense = copy.deepcopy(model)
    result = prune(model, data, PruningConfig())
    assert result.update == "none"
    assert note in result.notes[0]
    assert "pruned with update='none'" in result.notes[0]
    assert result.masks.digest() == prune(dense, data, PruningConfig(update="none")).masks.digest()


def test_a_second_stream_between_blocks_is_noticed():
    torch.manual_seed(0)
    model = Net([TwoStreams() for _ in range(4)], context=True)
    assert_same_choice(model, [torch.randn(8, 16)], "more than one tensor")


class Narrowing(nn.Module):
    """A block that halves its hidden state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width // 2)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(hidden)))


def test_blocks_of_other_widths_are_noticed():
    torch.manual_seed(0)
    model = Net([Narrowing(width) for width in (32, 16, 8)])
    assert_same_choice(model, [torch.randn(8, 32)], "shape of the hidden state")


class Sharing(nn.Module):
    def __init__(self, shared: nn.Linear) -> None:
        super().__init__()
        self.own, self.shared = nn.Linear(16, 16), shared

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.shared(torch.tanh(self.own(hidden)))


def test_one_layer_in_several_blocks_is_noticed():
    torch.manual_seed(0)
    shared = nn.Linear(16, 16)
    model = Net([Sharing(shared) for _ in range(3)])
    assert_same_choice(model, [torch.randn(8, 16)], "share the weight")


class ThreePlaces(nn.Module):
    """A block that is given its hidden state as query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return query + torch.tanh(self.query(query)) * self.key(key) + self.value(value)


class Repeating(Net):
    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden, hidden, value=hidden)
        return hidden


@pytest.mark.parametrize("count", [2, 4])
def test_a_hidden_state_in_several_places_is_noticed(count):
    torch.manual_seed(0)
    model = Repeating([ThreePlaces() for _ in range(count)])
    assert_same_choice(model, [torch.randn(8, 16)], "in more than one place")


@pytest.fixture
def score():
    """Registers a score under a name that is free again afterwards."""
    yield lambda function: register_score("odd", function)
    SCORES.pop("odd", None)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda w, n: n.unsqueeze(0), ConfigError, r"'odd' gave \(1, 32\) for \(32, 32\)"),
        (lambda w, n: w.sum(1, keepdim=True), ConfigError, r"gave \(32, 1\)"),
        (lambda w, n: w.t()[:, :5], ConfigError, "gave"),
        (lambda w, n: None, ConfigError, "gave NoneType"),
        (lambda w, n: w / 0, CalibrationError, "not finite.*'odd'.*divides by zero"),
    ],
)
@pytest.mark.parametrize("update", ["block", "none"])
def test_scores_of_the_wrong_form_are_reported_before_a_weight_changes(
    tiny_model, score, function, error, message, update
):
    score(function)
    model = tiny_model("llama")
    dense = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        prune(model, [{"input_ids": IDS}], PruningConfig(score="odd", update=update))
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("update", ["block", "none"])
def test_a_score_that_works_in_place_is_wanda_all_the_same(tiny_model, score, update):
    score(lambda w, n: w.abs_().mul_(n.sqrt_()))
    odd, plain = (tiny_model("llama") for _ in range(2))
    ours = prune(odd, [{"input_ids": IDS}], PruningConfig(score="odd", update=update))
    assert ours.masks.digest() == prune(plain, [{"input_ids": IDS}], PruningConfig(update=update)).masks.digest()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in odd.state_dict().items())


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_labels_of_an_encoder_decoder_are_trimmed_as_the_decoders(tiny_model, architecture):
    if architecture == "t5":
        model = tiny_model("t5")
    else:
        sizes = {
            f"{side}_{key}": value
            for side in ("encoder", "decoder")
            for key, value in (("layers", 2), ("ffn_dim", 48), ("attention_heads", 4))
        }
        config = transformers.BartConfig(vocab_size=61, d_model=32, max_position_embeddings=64, **sizes)
        model = transformers.BartForConditionalGeneration(config).eval()
    inputs, labels = IDS.clone(), IDS.flip(0).clone()
    mask = torch.ones_like(inputs)
    padded = {"input_ids": inputs, "attention_mask": mask, "labels": labels}
    mask[0, 6:] = 0
    labels[1, 9:] = -100
    alone = [
        {
            "input_ids": inputs[i : i + 1, : int(mask[i].sum())],
            "labels": labels[i : i + 1, : int((labels[i] != -100).sum())],
        }
        for i in range(len(inputs))
    ]
    other = copy.deepcopy(model)
    config = PruningConfig(micro_batch_size=1)
    assert prune(model, [padded], config).masks.digest() == prune(other, alone, config).masks.digest()


class Quantized(nn.Module):
    """A layer of a kind that keeps packed weights in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(16, 16, dtype=torch.int32))
        self.dense = nn.Linear(16, 16)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dense(hidden)


def test_weights_in_buffers_are_listed_as_left_dense():
    left = prune(Net([Quantized(), Quantized()]), [torch.randn(4, 16)]).left_dense
    assert left["layers.0.qweight"] == "a buffer of Quantized, not a parameter"


def test_eight_bit_floats_and_empty_layers_stay_dense_for_a_reason():
    model = Net([nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)) for _ in range(2)])
    model.layers[0][0].weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.float8_e4m3fn), requires_grad=False)
    model.layers[1][1].weight = nn.Parameter(torch.zeros(0, 16))
    left = prune(model, None, PruningConfig(score="magnitude")).left_dense
    assert "quantized" in left["layers.0.0.weight"]
    assert left["layers.1.1.weight"] == "has no weights"


def test_weights_that_are_not_in_memory_are_named():
    with torch.device("meta"):
        model = Net([nn.Sequential(nn.Linear(16, 16)) for _ in range(2)])
    with pytest.raises(ConfigError, match=r"layers\.0\.0\.weight.*'meta'.*device='cuda'"):
        prune(model, [torch.randn(4, 16)])


def test_layers_that_peft_trains_copies_of_stay_dense(tiny_model):
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["down_proj"])
    model = peft.get_peft_model(tiny_model("llama"), config)
    result = prune(model, [{"input_ids": IDS}])
    reasons = [reason for name, reason in result.left_dense.items() if name.endswith("down_proj.weight")]
    assert len(reasons) == 3
    assert all("modules_to_save" in reason for reason in reasons)
    assert not any("down_proj" in name for name in result.masks)


def test_a_merged_adapter_must_be_taken_out_first(tiny_model):
    model = peft.get_peft_model(
        tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    model.merge_adapter()
    with pytest.raises(ConfigError, match="unmerge_adapter"):
        prune(model, [{"input_ids": IDS}])
    model.unmerge_adapter()
    prune(model, [{"input_ids": IDS}]).masks.verify(model)


@pytest.mark.parametrize("update", ["block", "none"])
def test_a_model_made_in_inference_mode_is_pruned_as_any_other(tiny_model, update):
    config = PruningConfig(update=update)
    expected = prune(tiny_model("llama"), [{"input_ids": IDS}], config).masks
    with torch.inference_mode():
        model = tiny_model("llama")
    assert prune(model, [{"input_ids": IDS}], config).masks.digest() == expected.digest()
