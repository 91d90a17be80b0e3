"""`sparsefit export FOLDER --output OUT --format compact`: a pruned model at the size of what is kept, and back."""

from __future__ import annotations

from pathlib import Path

from sparsefit.cli.parsing import Parser
from sparsefit.recovery.compact import compress_folder, expand_folder
from sparsefit.recovery.inspection import MODEL_FOLDER, check_finite_folder
from sparsefit.recovery.run_files import check_ended
from sparsefit.reporting.console import console


def export(arguments: list[str]) -> int:
    """Write a compact folder or an ordinary one, and print the sizes counted on the files; 0 once it is written."""
    parser = Parser(
        "sparsefit export",
        description="Write a pruned model as a compact folder (kept values and one bit a weight), or a compact folder "
        "as an ordinary one in Hugging Face layout, every tensor as it was to the bit.",
    )
    parser.add_argument("folder", type=Path, help="compact: a run folder or a model folder; dense: a compact folder")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write: new or empty")
    parser.add_argument("--format", choices=("compact", "dense"), required=True, help="what to write")
    given = parser.parse_args(arguments)
    given.output = given.output.absolute()

    check_ended(given.folder)
    if given.format == "compact":
        check_finite_folder(given.folder)
    report = (compress_folder if given.format == "compact" else expand_folder)(given.folder, given.output)
    reasons: dict[str, int] = {}
    for why in report.plain.values():
        reasons[why] = reasons.get(why, 0) + 1
    share = report.bytes_after / max(1, report.bytes_before)
    lines = [
        f"{given.folder}: {report.bytes_before:,} bytes of weights",
        f"{report.folder}: {report.bytes_after:,} bytes of weights ({share:.1%})",
        f"{len(report.compact)} tensors as kept values and bits"
        + "".join(f"; {count} as they are ({why})" for why, count in reasons.items()),
    ]
    apart = given.folder / "adapter"
    if given.format == "compact" and apart.is_dir() and not (given.folder / MODEL_FOLDER).is_dir():
        lines.append(
            f"The adapter in {apart} is not in it: this is the base. `sparsefit merge` makes one model of both."
        )
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    return 0
