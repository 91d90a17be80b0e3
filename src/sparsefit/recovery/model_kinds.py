"""The kind of model of a transformers class, and PEFT's task type for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from torch import nn


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        words: Its name in messages.
        task: PEFT's task type; None if PEFT has none.
        auto: The auto class of transformers that loads it, with a new head if the weights have none.
        mappings: The tables of its classes in transformers.
    """

    words: str
    task: str | None
    auto: str
    mappings: tuple[str, ...]


KINDS: dict[str, Kind] = {
    "causal_lm": Kind("causal language model", "CAUSAL_LM", "AutoModelForCausalLM", ("MODEL_FOR_CAUSAL_LM",)),
    "sequence_classification": Kind(
        "sequence classifier", "SEQ_CLS", "AutoModelForSequenceClassification", ("MODEL_FOR_SEQUENCE_CLASSIFICATION",)
    ),
    "token_classification": Kind(
        "token classifier", "TOKEN_CLS", "AutoModelForTokenClassification", ("MODEL_FOR_TOKEN_CLASSIFICATION",)
    ),
    "seq2seq": Kind(
        "sequence-to-sequence model",
        "SEQ_2_SEQ_LM",
        "AutoModelForSeq2SeqLM",
        ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM", "MODEL_FOR_SPEECH_SEQ_2_SEQ"),
    ),
    "image_classification": Kind(
        "image classifier", None, "AutoModelForImageClassification", ("MODEL_FOR_IMAGE_CLASSIFICATION",)
    ),
    "encoder": Kind("model without a head", "FEATURE_EXTRACTION", "AutoModel", ("MODEL",)),
}


def kind_of(class_name: str) -> str | None:
    """The kind of a transformers class: a key of `KINDS`, or None for any other kind.

    >>> kind_of("BertForSequenceClassification"), kind_of("BertForMaskedLM")
    ('sequence_classification', None)
    """
    return next((kind for kind in KINDS if class_name in classes_of(kind)), None)


@cache
def classes_of(kind: str) -> frozenset[str]:
    """The names of the transformers classes of a kind."""
    from transformers.models.auto import modeling_auto

    names: set[str] = set()
    for mapping in KINDS[kind].mappings:
        for value in getattr(modeling_auto, f"{mapping}_MAPPING_NAMES").values():
            names |= {value} if isinstance(value, str) else set(value)
    return frozenset(names)


def task_type(model: nn.Module) -> str | None:
    """PEFT's task type of a model; None for plain modules and for inputs that PEFT's task classes do not accept.

    With the task type of a classifier, PEFT trains the head and saves it with the adapter.
    """
    if getattr(model, "main_input_name", None) != "input_ids":  # Whisper's are input_features
        return None
    kind = kind_of(type(model).__name__)
    if kind is not None:
        return KINDS[kind].task
    if not hasattr(model, "prepare_inputs_for_generation"):
        return None
    return "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"
