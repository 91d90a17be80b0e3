"""`sparsefit push RUN REPO_ID`: a finished run's model on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from sparsefit.cli.input_errors import Parser
from sparsefit.hub import push_to_hub
from sparsefit.reporting.console import console


def push(arguments: list[str]) -> int:
    """Upload a part of a run with its model card, and print where it is."""
    parser = Parser(
        "sparsefit push",
        description="Put the model of a finished run on the Hugging Face hub, with its masks and a model card written "
        "from its report. Damaged files are refused.",
    )
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("repo_id", help="the repository, OWNER/NAME; it is made if it is not there")
    parser.add_argument("--private", action="store_true", help="make a new repository a private one")
    parser.add_argument(
        "--what",
        choices=("model", "base", "adapter"),
        default="model",
        help="the recovered model (the default), the pruned one before the recovery, or the adapter that goes on it",
    )
    given = parser.parse_args(arguments)
    url = push_to_hub(given.run, given.repo_id, given.private, given.what)
    console.print(f"pushed to {url}", markup=False, soft_wrap=True)
    return 0
