"""Padding counts for nothing: the masks are those of the same sequences without padding, one by one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sparsefit import PruningConfig, collect_statistics, prune
from sparsefit.calibration.padding_masks import PaddingMask, masks_given
from sparsefit.pruning.input_watch import Seen, real_rows
from sparsefit.pruning.layers import matrices_of

LENGTHS = [5, 16, 9, 7, 12, 3, 16, 11]


def randomized(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3, generator=generator)
            else:
                parameter.uniform_(0.5, 1.0, generator=generator)
    return model.eval()


def sequences(lengths=LENGTHS, longest=16) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 61, (len(lengths), longest), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def alone(ids, lengths=LENGTHS):
    return [ids[row : row + 1, :length] for row, length in enumerate(lengths)]


class Encoder(nn.Module):
    """torch's own encoder; the mask is made where the model is called, in one of these ways."""

    def __init__(self, batch_first: bool = True, made: str = "of ids") -> None:
        super().__init__()
        self.batch_first, self.made = batch_first, made
        self.embed = nn.Embedding(61, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=batch_first)
        self.encoder, self.head = nn.TransformerEncoder(layer, 3), nn.Linear(32, 2)

    def forward(self, ids, padding=None):
        x = self.embed(ids)
        x = x if self.batch_first else x.transpose(0, 1)
        padding = ids == 0 if self.made == "of ids" else padding
        if self.made == "added" and padding is not None:
            padding = torch.zeros(ids.shape).masked_fill(padding, -torch.inf)
        return self.head(self.encoder(x, src_key_padding_mask=padding))


class Bare(nn.Module):
    """Custom blocks in which only the attention gets the padding mask."""

    class Block(nn.Module):
        def __init__(self, batch_first: bool) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, batch_first=batch_first)
            self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

        def forward(self, x, gone):
            x = x + self.attention(x, x, x, key_padding_mask=gone)[0]
            return x + self.down(self.up(x).relu())

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.embed, self.batch_first = nn.Embedding(61, 32), batch_first
        self.blocks = nn.ModuleList(self.Block(batch_first) for _ in range(2))

    def forward(self, ids):
        x = self.embed(ids)
        x = x if self.batch_first else x.transpose(0, 1)
        for block in self.blocks:
            x = block(x, ids == 0)
        return x


@pytest.mark.slow
@pytest.mark.parametrize("update", ["block", "none"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("make", [Encoder, Bare])
def test_a_mask_that_the_model_makes_by_itself(make, batch_first, update):
    ids, mask = sequences()
    expected = prune(randomized(make(batch_first)), alone(ids), PruningConfig(update=update))
    result = prune(randomized(make(batch_first)), [ids[:3], ids[3:]], PruningConfig(update=update))
    assert result.tokens == expected.tokens == int(mask.sum())
    assert result.masks.digest() == expected.masks.digest()
    assert not result.notes


@pytest.mark.parametrize("made", ["given", "added"])
def test_a_mask_of_torch_in_a_tuple(made):
    ids, mask = sequences()
    expected = prune(randomized(Encoder(made=made)), alone(ids))
    result = prune(randomized(Encoder(made=made)), [(ids, mask == 0)])
    assert result.tokens == int(mask.sum())
    assert result.masks.digest() == expected.masks.digest()


@pytest.mark.slow
@pytest.mark.parametrize("length", [16, 8])  # as many tokens as samples in a micro-batch, too
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("make", [Encoder, Bare])
def test_padding_inside_a_sequence(make, batch_first, length):
    ids, _ = sequences([length] * 8, length)
    ids[torch.arange(8), torch.arange(8) % (length - 2) + 1] = 0

    def run(batches, changed):
        torch.manual_seed(3)
        model = randomized(make(batch_first))
        with torch.no_grad():
            model.embed.weight[0] = 100.0 if changed else 0.0  # what is padding may be anything
        return prune(model, batches)

    result, other = run([ids], False), run([ids], True)
    assert result.tokens == int((ids != 0).sum())
    assert not result.notes
    assert result.masks.digest() == other.masks.digest()


@pytest.mark.slow
@pytest.mark.parametrize("length", [16, 10])  # of texts and labels of one length, too
@pytest.mark.parametrize("update", ["block", "none"])
@pytest.mark.parametrize("form", ["mapping", "tuple"])
def test_an_encoder_and_its_decoder_have_padding_of_their_own(tiny_model, form, update, length):
    ids, mask = sequences()
    lengths = [3, 5, 10, 7, 2, 9, 4, 6]
    labels = torch.randint(3, 61, (8, length), generator=torch.Generator().manual_seed(2))
    labels[torch.arange(length) >= torch.tensor(lengths)[:, None]] = -100
    own = zip(alone(ids), alone(labels, lengths), strict=True)
    config = PruningConfig(update=update)
    expected = prune(tiny_model("t5"), [{"input_ids": text, "labels": target} for text, target in own], config)
    model = tiny_model("t5")
    if form == "mapping":
        result = prune(model, [{"input_ids": ids, "attention_mask": mask, "labels": labels}], config)
    else:
        batches = [(ids[:5], mask[:5], labels[:5]), (ids[5:], mask[5:], labels[5:])]
        names = ("input_ids", "attention_mask", "labels")
        result = prune(model, batches, config, forward=lambda batch: model(**dict(zip(names, batch, strict=True))))
    assert result.masks.digest() == expected.masks.digest()
    assert not result.notes


def test_what_a_decoder_attends_to_has_the_padding_of_the_encoder(tiny_model):
    """Of equal lengths, with holes, so that nothing can be cut off before."""
    ids, mask = sequences([16] * 8)
    mask[:, 3:9] = 0
    labels = sequences([16] * 8)[0].flip(0)
    decoder = torch.ones_like(mask)
    decoder[:, 11] = 0
    model = tiny_model("t5")
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "decoder_attention_mask": decoder}
    statistics = collect_statistics(model, [batch], [PruningConfig(update="none")])
    assert statistics.parts
    for name, [part] in statistics.parts.items():
        of_memory = ".EncDecAttention.k" in name or ".EncDecAttention.v" in name
        expected = mask if name.startswith("encoder.") or of_memory else decoder
        assert part.statistics.tokens == int(expected.sum()), name


def speech(norm: str) -> nn.Module:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    torch.manual_seed(0)
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    settings |= {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    settings |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "vocab_size": 20}
    config = Wav2Vec2Config(
        **settings, feat_extract_norm=norm, do_stable_layer_norm=norm == "layer", apply_spec_augment=False
    )
    return randomized(Wav2Vec2ForCTC(config))


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("form", ["mapping", "tuple", "forward"])
def test_a_mask_of_samples_of_sound(form, norm):
    lengths = [400, 250, 311, 123]
    mask = (torch.arange(400) < torch.tensor(lengths)[:, None]).long()
    waves = torch.randn(4, 400, generator=torch.Generator().manual_seed(0)) * mask
    expected = prune(speech(norm), [(wave,) for wave in alone(waves, lengths)])
    model = speech(norm)
    if form == "mapping":
        result = prune(model, [{"input_values": waves, "attention_mask": mask}])
    elif form == "tuple":
        result = prune(model, [(waves, mask)])
    else:
        call = {"forward": lambda batch: model(input_values=batch[0], attention_mask=batch[1])}
        result = prune(model, [(waves, mask)], **call)
    assert result.tokens == expected.tokens
    assert result.masks.digest() == expected.masks.digest()
    assert not result.notes


def test_frames_of_sound_of_which_two_make_one_state():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_source_positions": 50}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    config = WhisperConfig(vocab_size=60, num_mel_bins=8, max_target_positions=20, **sizes, **tokens)
    sound = torch.randn(3, 8, 100, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(100) < torch.tensor([[100], [40], [61]])).long()
    labels = torch.full((3, 4), 7)
    named = prune(
        randomized(WhisperForConditionalGeneration(config)),
        [{"input_features": sound, "attention_mask": mask, "labels": labels}],
    )
    model = randomized(WhisperForConditionalGeneration(config))
    names = ("input_features", "attention_mask", "labels")
    call = {"forward": lambda batch: model(**dict(zip(names, batch, strict=True)))}
    for result in (named, prune(model, [(sound, mask, labels)], **call)):
        assert result.tokens == 50 + 20 + 31
        assert not result.notes


def llava(vision: int = 8) -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return randomized(
        LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=CLIPVisionConfig(**sizes, image_size=vision, patch_size=4),
                text_config=LlamaConfig(vocab_size=70, **sizes, pad_token_id=0),
                image_token_index=65,
                vision_feature_layer=-1,
            )
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("length", [9, 5])  # 5: as many tokens as there are patches
@pytest.mark.parametrize("update", ["block", "none"])
def test_patches_carry_no_mask_and_no_note(length, update):
    ids, pixels = (
        sequences([length] * 4, length)[0],
        torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    )
    ids[:, :4] = 65
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    mask[2, 2] = length == 5  # a hole in the longer ones
    config = PruningConfig(update=update)
    result = prune(llava(), [{"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}], config)
    assert not result.notes
    whole = prune(llava(), [{"input_ids": ids, "pixel_values": pixels}], config)
    for name, kept in whole.masks.items():
        if "vision_tower" in name:
            assert torch.equal(result.masks[name], kept), name


def test_experts_that_get_some_tokens_are_reported_once(tiny_model):
    ids, mask = sequences()
    mask[:, 1] = 0
    model = tiny_model("mixtral")
    call = {"forward": lambda batch: model(input_ids=batch[0], attention_mask=batch[1])}
    result = prune(model, [(ids, mask)], **call)
    reported = [note for note in result.notes if "padding could not be told" in note]
    assert reported
    assert len(reported) == len(set(reported))
    assert all(".experts." in note for note in reported)


IDS = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("given", "real"),
    [
        ({"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}, [[1, 1, 0], [1, 1, 1]]),
        ({"x": IDS, "padding_mask": torch.tensor([[False, True, True]] * 2)}, [[1, 0, 0]] * 2),
        ({"x": IDS, "padding_mask": torch.tensor([[1, 0, 0]] * 2)}, [[1, 0, 0]] * 2),
        ({"x": IDS, "key_padding_mask": torch.tensor([[0.0, -math.inf, 0.0]] * 2)}, [[1, 0, 1]] * 2),
        ({"x": IDS, "attention_mask": torch.tensor([[1.0, 0.0, 1.0]] * 2)}, [[1, 0, 1]] * 2),
        ({"x": IDS, "attention_mask": torch.tensor([[0.0, -9.0, 0.0]] * 2)}, None),  # added, of whatever
        ({"x": IDS, "attention_mask": torch.ones(3, 3).tril()}, None),  # tokens by tokens
        ({"x": IDS, "attention_mask": torch.ones(2, 1, 3, 3)}, None),
        ({"x": torch.ones(2, 1), "attention_mask": torch.tensor([[1, 1, 0]] * 2)}, None),  # of a cache
        ({"x": torch.ones(3, 2, 8), "src_key_padding_mask": torch.tensor([[False, True, False]] * 2)}, [[1, 0, 1]] * 2),
    ],
)
def test_what_is_a_padding_mask_and_which_way_round(given, real):
    found = masks_given(given, frozenset(given)).main
    assert (None if found is None else found.real.int().tolist()) == real


@pytest.mark.parametrize(
    ("shape", "seq_first", "rows"),
    [
        ((2, 3, 4), False, [1, 1, 0, 1, 0, 0]),
        ((3, 2, 4), False, [1, 1, 1, 0, 0, 0]),
        ((6, 4), False, [1, 1, 0, 1, 0, 0]),
        ((6, 4), True, [1, 1, 1, 0, 0, 0]),
        ((2, 3, 2, 4), False, [1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0]),
        ((2, 2, 3, 4), False, [1, 1, 0, 1, 1, 0, 1, 0, 0, 1, 0, 0]),
        ((2, 4), False, None),  # one for each sample
        ((2, 7, 4), False, None),  # patches
        ((3, 4), False, None),  # the real tokens alone
    ],
)
def test_which_rows_of_inputs_are_real(shape, seq_first, rows):
    [weight] = matrices_of(nn.Linear(4, 4))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    seen = Seen(weight, None, torch.ones(*shape), 0, lambda: iter(()), None)
    found = real_rows(PaddingMask(mask, mask, seq_first), seen)
    assert (None if found is None else found.int().tolist()) == rows
