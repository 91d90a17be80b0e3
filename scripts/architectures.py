"""Prunes tiny random models of many architectures of transformers, and compares the masks with a slow brute force.

    python scripts/architectures.py                 # one line for each architecture
    python scripts/architectures.py --write         # also writes the table in docs/architectures.md
    python scripts/architectures.py --only Mixtral  # only those with this in their name

The models are created from configurations; nothing is downloaded. They are listed in tests/pruning/architectures.py;
the brute force is in tests/pruning/brute_force.py.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests/pruning")]

from architectures import ARCHITECTURES  # noqa: E402
from brute_force import TOLERANCE, Comparison, compare  # noqa: E402
from tiny_transformers import model_of, samples_of  # noqa: E402

from sparsefit import prune  # noqa: E402
from sparsefit.pruning.results import PruningResult  # noqa: E402

PAGE = ROOT / "docs/architectures.md"
HEAD = """# Architectures

`WandaPruning` was run on {count} architectures of transformers, as tiny models with random weights, with its default
settings (Wanda, half of each row, block by block) and five samples:

    python scripts/architectures.py --write

Versions: torch {torch}, transformers {transformers}, on a CPU. In {agreeing} of {count} architectures the masks equal
those of a brute-force implementation. The columns:

- *pruned*: the share of the weights in the model's matrices that have a mask (`result.coverage`). Embeddings do not
  count as matrices, because nothing is multiplied by them. Tiny models have large heads and patch embeddings for their
  size; in real models these shares are smaller.
- *zeros*: the share of zeros over all of these matrices (`result.overall_sparsity`).
- *order*: `block`: blocks are pruned one after the other, each with the inputs that it gets from the pruned blocks
  before it. `none`: everything is pruned from one pass of the dense model. "then the rest": some blocks are pruned
  after the others, from one pass (see the notes).
- *brute force*: whether every bit of every mask equals that of a stable sort of |W| * ||x|| in each row. The inputs x
  come from passes of the whole model, one sample at a time, repeated for each block. They are observed at the calls of
  ATen's products, a level below the torch functions on which the engine relies. "yes" means that all bits are equal,
  except those whose scores differ from the row's threshold by less than {tolerance:g} of it, where rounding decides. If
  there are such differences, the share of equal bits is given. "no" is followed by the number of matrices with other
  differences.
- *left dense*: all other matrices by reason, as a share of all weights in matrices.

| architecture | class | pruned | zeros | order | brute force | left dense |
|---|---|---:|---:|---|---|---|
"""


class Row(NamedTuple):
    """The result for one architecture."""

    name: str
    result: PruningResult
    comparison: Comparison
    seconds: float

    @property
    def model_class(self) -> str:
        """The name of the model's class."""
        return ARCHITECTURES[self.name].family + ARCHITECTURES[self.name].head

    @property
    def order(self) -> str:
        """The order of pruning that was used."""
        later = any(note.endswith("from one pass of the data") for note in self.result.notes)
        return f"{self.result.update}, then the rest" if later else self.result.update

    @property
    def verdict(self) -> str:
        """Whether the masks equal those of the brute force."""
        found = self.comparison
        if found.wrong:
            return f"no ({len(found.wrong)} of {len(self.result.masks.parameters)} matrices)"
        if found.unseen:
            return f"{found.verdict}: {', '.join(found.unseen)}"
        return found.verdict if found.equal == found.bits else f"{found.verdict} ({found.equal / found.bits:.4%})"

    @property
    def left_dense(self) -> str:
        """Shares of the model's matrices by reason."""
        result, shares = self.result, {}
        for name, size in result.dense_sizes.items():
            reason = result.left_dense[name]
            shares[reason] = shares.get(reason, 0) + size
        pruned = sum(mask.numel() for mask in result.masks.values())
        in_all = pruned + sum(shares.values())
        ordered = sorted(shares.items(), key=lambda share: -share[1])
        return "; ".join(f"{size / in_all:.1%} {reason}" for reason, size in ordered)

    @property
    def notes(self) -> list[str]:
        """The notes of the report; those on weights without tokens are combined into one."""
        unseen = [note for note in self.result.notes if "saw no calibration token" in note]
        others = [note for note in self.result.notes if note not in unseen and not note.startswith("only ")]
        if unseen:
            first = re.split(" of the experts | saw ", unseen[0])[0]
            more = f" and {len(unseen) - 1} more" if unseen[1:] else ""
            others.append(f"{first}{more} saw no calibration tokens, entirely or for some experts; pruned by magnitude")
        return others


def examine(name: str) -> Row:
    """Prune one model and compare the masks."""
    start = time.perf_counter()
    model = model_of(name)
    dense = copy.deepcopy(model)
    result = prune(model, samples_of(name))
    comparison = compare(dense, model, result, samples_of(name), ARCHITECTURES[name].blocks)
    return Row(name, result, comparison, time.perf_counter() - start)


def page(rows: list[Row]) -> str:
    """The table in Markdown."""
    text = HEAD.format(
        count=len(rows),
        torch=torch.__version__.partition("+")[0],
        transformers=transformers.__version__,
        agreeing=sum(row.comparison.verdict == "yes" for row in rows),
        tolerance=TOLERANCE,
    )
    kind = ""
    for row in rows:
        if kind != ARCHITECTURES[row.name].kind:
            kind = ARCHITECTURES[row.name].kind
            text += f"| **{kind}** | | | | | | |\n"
        shares = f"{row.result.coverage:.1%} | {row.result.overall_sparsity:.1%}"
        text += f"| {row.name} | `{row.model_class}` | {shares} | {row.order} | {row.verdict} | {row.left_dense} |\n"
    text += "\n## Notes from the reports\n\n"
    text += "".join(f"- {row.name}: {note}.\n" for row in rows for note in row.notes)
    return text


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    parser.add_argument("--only", default="", help="part of an architecture's name")
    args = parser.parse_args()
    if args.write and args.only:
        parser.error("the page is of all architectures: leave out --only, or --write")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = []
    for name in (name for name in ARCHITECTURES if args.only in name):
        row = examine(name)
        rows.append(row)
        shares = f"pruned {row.result.coverage:6.1%}, zeros {row.result.overall_sparsity:6.1%}"
        equal = f"{row.comparison.equal / row.comparison.bits:.4%} of the bits"
        print(f"{name:20} {shares}, {row.order:21} {row.verdict} ({equal}, {row.seconds:.1f} s)", flush=True)
    if args.write:
        PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
