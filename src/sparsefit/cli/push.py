"""`sparsefit push RUN REPO_ID` uploads a finished run's model to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from sparsefit.cli.input_errors import Parser
from sparsefit.hub import push_to_hub
from sparsefit.reporting.console import console


def push(arguments: list[str]) -> int:
    """Upload a model of a run with its model card, and print the address."""
    parser = Parser(
        "sparsefit push",
        description="Upload the model of a finished run to the Hugging Face hub, with its masks and a model card made "
        "from its report. Damaged files are not uploaded.",
    )
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("repo_id", help="the repository, OWNER/NAME; it is created if it does not exist")
    parser.add_argument("--private", action="store_true", help="create the repository as private")
    parser.add_argument(
        "--what",
        choices=("model", "base", "adapter"),
        default="model",
        help="the recovered model (the default), the pruned model before recovery, or the adapter for the pruned model",
    )
    given = parser.parse_args(arguments)
    url = push_to_hub(given.run, given.repo_id, given.private, given.what)
    console.print(f"pushed to {url}", markup=False, soft_wrap=True)
    return 0
