"""The options of `sparsefit prune` and `sparsefit plan` that are not settings of a recipe.

They are parsed first, and their help needs no slow import; LightningCLI parses the other arguments.
"""

from __future__ import annotations

from sparsefit.cli.input_errors import Parser

_EPILOG = (
    "SETTING is any setting of the recipe, such as --pruning.sparsity 0.6. `sparsefit fit --help` lists the settings, "
    "and the options --config and --resume."
)


def prune_parser() -> Parser:
    """The parser of `sparsefit prune`'s own options and help."""
    parser = Parser(
        "sparsefit prune",
        usage="sparsefit prune [-h] [--stream] (--config FILE | --resume RUN) [--SETTING VALUE ...]",
        description="Run a recipe without training: evaluate the model, prune it, evaluate it again, export it and "
        "write the report.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--stream",
        action="store_true",
        help="prune a causal language model that is larger than memory, one block at a time; without evaluation",
    )
    return parser


def plan_parser() -> Parser:
    """The parser of `sparsefit plan`'s own options and help."""
    parser = Parser(
        "sparsefit plan",
        usage="sparsefit plan [-h] [--gpu NAME] --config FILE [--SETTING VALUE ...]",
        description="Predict the time, memory and disk space of a recipe, and how many training steps fit into its "
        "budget. Short runs on a model with few blocks are measured; the recipe itself does not run.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--gpu", metavar="NAME", help="predict for this GPU from its data sheet, not for this machine; measures nothing"
    )
    return parser
