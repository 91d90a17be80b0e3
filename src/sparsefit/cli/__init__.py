"""The command line: `sparsefit fit`, `prune`, `plan`, `study`, `evaluate`, `inspect`, `merge`, `speed`, `export`
and `push`.

Each command imports what it needs when it runs, so that help and errors appear without delay.
"""

from __future__ import annotations

import sys

USAGE = """usage: sparsefit COMMAND ...

  fit --config FILE      prune a model, recover it within a GPU-hour budget, export it and write a report
  fit --resume RUN       resume an interrupted run from its newest checkpoint
  prune --config FILE    run a recipe without training: evaluate, prune, evaluate again, export and write a report
  prune --stream ...     prune a model larger than memory, one block at a time; no evaluation
  plan --config FILE     predict time, memory, disk space and training steps on this machine
  study --config FILE    prune one or more models at every point of a grid; writes a table and figures
  evaluate MODEL ...     measure zero-shot tasks (with lm-eval) and perplexity of a saved language model
  inspect FOLDER         count the zeros of a saved model and check them against its masks
  merge RUN              merge a run's adapter into its sparse base and keep every zero
  speed RUN              measure speed and memory against the dense model
  export FOLDER ...      write a pruned model as GGUF, ONNX or OpenVINO IR, and check the files
  push RUN OWNER/NAME    upload a finished run's model to the Hugging Face hub, with a model card made from its report

Every setting of a recipe can also be given on the command line, such as --pruning.sparsity 0.6. `sparsefit fit --help`
lists the settings; `sparsefit fit --model.help CLASS` and `--data.help CLASS` list those of a model or data class.
`sparsefit COMMAND --help` describes a command."""


def main() -> int:
    """Run the command of `sys.argv` and return the exit status: 1 if a check failed, 2 for wrong input."""
    command, *rest = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command == "--version":
        from sparsefit import __version__

        print(__version__)
        return 0
    if command not in ("fit", "prune", "plan", "study", "evaluate", "inspect", "merge", "speed", "export", "push"):
        print(f"sparsefit: there is no command {command!r}\n\n{USAGE}", file=sys.stderr)
        return 2

    from sparsefit.errors import ConfigError, SparsefitError

    try:
        if command == "inspect":
            from sparsefit.cli.inspect import inspect

            return inspect(rest)
        if command == "merge":
            from sparsefit.cli.merge import merge_run

            return merge_run(rest)
        if command == "speed":
            from sparsefit.cli.speed import speed

            return speed(rest)
        if command == "export":
            from sparsefit.cli.export import export

            return export(rest)
        if command == "push":
            from sparsefit.cli.push import push

            return push(rest)
        if command == "evaluate":
            from sparsefit.cli.evaluate import evaluate

            return evaluate(rest)
        if command == "plan":
            from sparsefit.cli.command_options import plan_parser

            given, rest = plan_parser().parse_known_args(rest)
            from sparsefit.cli.plan import plan

            return plan(rest, given.gpu)
        if command == "study":
            from sparsefit.cli.study import run_study

            return run_study(rest)
        if command == "prune":
            from sparsefit.cli.command_options import prune_parser

            given, rest = prune_parser().parse_known_args(rest)
            if given.stream:
                from sparsefit.cli.streaming import prune_streamed

                return prune_streamed(rest)
        from sparsefit.cli.fit import fit

        return fit(rest, train=command == "fit")
    except SparsefitError as error:
        return _print_error(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if type(error).__name__ == "MisconfigurationException":  # Lightning's, which is slow to import
            return _print_error(ConfigError(error))
        cause: BaseException | None = error if isinstance(error, ValueError) else None
        while cause is not None and not isinstance(cause, SparsefitError):  # the parser wraps the errors of classes
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        return _print_error(cause)


def _print_error(error: BaseException) -> int:
    print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
