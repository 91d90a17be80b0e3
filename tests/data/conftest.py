from __future__ import annotations

import json
import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer():
    """Each byte is a token; no special token is added, and 256 ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(alphabet)} | {"<end>": 256}
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<end>")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """60 documents of 20 to 120 bytes; document 7 consists of "007 " repeated, and so on."""
    lengths = random.Random(0)
    file = tmp_path_factory.mktemp("corpus") / "c4.jsonl"
    rows = [f"{number:03d} " * lengths.randint(5, 30) for number in range(60)]
    file.write_text("".join(json.dumps({"text": row, "timestamp": "", "url": ""}) + "\n" for row in rows))
    return file
