"""The command line: `sparsefit fit`, `prune`, `plan`, `study`, `evaluate`, `inspect`, `merge`, `speed`, `export`
and `push`.

Each command imports what it needs when it runs, so that help and errors come at once.
"""

from __future__ import annotations

import sys

USAGE = """usage: sparsefit COMMAND ...

  fit --config FILE      prune a model at fit start, recover it inside a GPU-hour budget, export and report
  fit --resume RUN       go on with the run in a folder, whatever ended it: from its newest checkpoint, or its end
  prune --config FILE    the same recipe without its training: evaluate, prune, evaluate, export and report
  prune --stream ...     the same of a model larger than memory, in its files; without evaluation
  plan --config FILE     what the recipe will take here: time, memory, disk, and the steps its budget buys
  study --config FILE    prune one or more models at every point of a grid, from one calibration; table and figures
  evaluate MODEL ...     zero-shot tasks by lm-eval, and perplexity, of any saved language model
  inspect FOLDER         count the zeros of a saved model and check them against its masks
  merge RUN              merge the adapter of a run into its sparse base without losing a zero
  speed RUN              is it faster or smaller here? tokens a second and memory, against the dense model
  export FOLDER ...      write a pruned model as GGUF, ONNX or OpenVINO IR, and check it there
  push RUN OWNER/NAME    put a finished run's model on the Hugging Face hub, with a model card of its report

Every setting of a recipe can be given on the command line too (--pruning.sparsity 0.6); `sparsefit fit --help`
lists them, and `sparsefit fit --model.help CLASS` or `--data.help CLASS` those of a model or data class."""


def main() -> int:
    """Run the command of `sys.argv`; returns the exit status: 2 for wrong input, 1 for a check that failed."""
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
            from sparsefit.cli.plan import plan

            return plan(rest)
        if command == "study":
            from sparsefit.cli.study import run_study

            return run_study(rest)
        if command == "prune" and "--stream" in rest:
            from sparsefit.cli.streaming import prune_streamed

            return prune_streamed(rest)
        from sparsefit.cli.fit import fit

        return fit(rest, train=command == "fit")
    except SparsefitError as error:
        return _wrong(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if type(error).__name__ == "MisconfigurationException":  # Lightning's, which is slow to import
            return _wrong(ConfigError(error))
        cause: BaseException | None = error if isinstance(error, ValueError) else None
        while cause is not None and not isinstance(cause, SparsefitError):  # the parser wraps what classes raise
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        return _wrong(cause)


def _wrong(error: BaseException) -> int:
    print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
