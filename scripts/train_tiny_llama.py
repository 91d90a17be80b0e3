"""Train the small Llama of the package from scratch: its tokenizer, then its weights.

    python scripts/train_tiny_llama.py --minutes 80 --compile --output src/sparsefit/assets/tiny_llama \
        --texts wikitext2/valid.txt tinystories/train_sample.jsonl \
                c4_sample/c4_train_1000.jsonl:900 c4_sample/c4_pf_decoding_1480.jsonl

It reads Python's documentation from the running Python (all but its test part) and any further texts: a
plain file is one document, a `.jsonl` file has a document in each line's field `text`, and `FILE:N` takes
the first N of them. The learning rate falls linearly to zero as the minutes run out. `--start` continues from a
saved model and its tokenizer.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparsefit.data.python_docs import documents

CONFIG = dict(
    vocab_size=4096,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=6,
    max_position_embeddings=256,
    tie_word_embeddings=True,
)
END, PAD = "<|endoftext|>", "<|pad|>"


def read_texts(source: str) -> list[str]:
    """The documents of `FILE` or `FILE:N`."""
    name, _, count = source.partition(":")
    file = Path(name)
    if file.suffix == ".jsonl":
        texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    else:
        texts = [file.read_text(encoding="utf-8")]
    return texts[: int(count)] if count else texts


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: it can encode any text, and decoding gives the text back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONFIG["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All documents, each closed by the end token, as one (tokens,) tensor."""
    ids: list[int] = []
    for encoded in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        ids += [*encoded, tokenizer.eos_token_id]
    return torch.tensor(ids)


def windows(stream: torch.Tensor, length: int, batch_size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Batches of (batch, length) windows: each epoch cuts the stream at another offset and shuffles the pieces."""
    while True:
        offset = int(torch.randint(length, (), generator=generator))
        pieces = stream[offset : offset + (len(stream) - offset) // length * length].view(-1, length)
        order = torch.randperm(len(pieces), generator=generator)
        yield from pieces[order].split(batch_size)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, stream: torch.Tensor, length: int) -> float:
    """exp of the mean next-token loss over non-overlapping windows of a stream."""
    pieces = stream[: len(stream) // length * length].view(-1, length)
    losses = [model(input_ids=batch, labels=batch).loss * len(batch) for batch in pieces.split(32)]
    return math.exp(torch.stack(losses).sum().item() / len(pieces))


def optimizer_of(model: LlamaForCausalLM, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices, not norms."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Model in bfloat16 and tokenizer, in Hugging Face layout."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(
    model: LlamaForCausalLM,
    batches: Iterator[torch.Tensor],
    args: argparse.Namespace,
    device: torch.device,
) -> Iterator[tuple[int, float, float]]:
    """Train until the minutes are spent; yields (step, loss, share of the minutes spent) after each step."""
    forward = torch.compile(model) if args.compile else model
    optimizer = optimizer_of(model, args.learning_rate, args.weight_decay)
    start, step, spent = time.monotonic(), 0, 0.0
    while spent < 1:
        rate = args.learning_rate * min((step + 1) / args.warmup_steps, 1 - spent)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = next(batches).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = forward(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        spent = (time.monotonic() - start) / (60 * args.minutes)
        yield step, loss.item(), spent


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="*", default=[], metavar="FILE[:N]")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="a folder with a model to continue from, instead of random weights")
    parser.add_argument("--minutes", type=float, default=80)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warmup-steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile: faster, needs a C++ compiler on CPU")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    python_docs = documents("train") + documents("calibration")
    further = [text for source in args.texts for text in read_texts(source)]
    if args.start:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.start)
    else:
        tokenizer = train_tokenizer(python_docs + further, CONFIG["vocab_size"])
    # Python's documentation is used twice: it is the smaller part, and the quickstart is about it.
    stream = torch.cat([token_stream(tokenizer, python_docs)] * 2 + [token_stream(tokenizer, further)])
    held_out = token_stream(tokenizer, documents("test")).to(device)
    end = tokenizer.eos_token_id
    config = LlamaConfig(**CONFIG, bos_token_id=end, eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
    model = LlamaForCausalLM.from_pretrained(args.start, dtype="float32") if args.start else LlamaForCausalLM(config)
    model.train().to(device)
    length = CONFIG["max_position_embeddings"]
    print(f"{model.num_parameters():,} parameters, {len(stream):,} tokens an epoch, {len(held_out):,} held out")

    batches = windows(stream, length, args.batch_size, torch.Generator().manual_seed(args.seed))
    for step, loss, spent in train(model, batches, args, device):
        if step % 500 == 0:
            print(f"{spent:6.1%} step {step} loss {loss:.3f}", flush=True)
        if step % 2000 == 0:
            print(f"{spent:6.1%} step {step} held-out perplexity {perplexity(model, held_out, length):.2f}", flush=True)
            save(model, tokenizer, args.output)
    save(model, tokenizer, args.output)
    print(f"{step} steps of {args.batch_size} x {length} tokens")
    print(f"held-out perplexity, windows of {length} tokens: {perplexity(model, held_out, length):.3f}")


if __name__ == "__main__":
    main()
