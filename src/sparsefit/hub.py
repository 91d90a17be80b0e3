"""`push_to_hub`: uploads the model of a finished run to the Hugging Face hub, with a model card from its report."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from sparsefit.errors import ConfigError, DivergenceError, HubError, MaskError, RunFolderError
from sparsefit.files import SUMS_FILE
from sparsefit.modules.lookup_hints import hub_problem
from sparsefit.recovery.inspection import BASE_FOLDER, MASKS_FILE, MODEL_FOLDER, inspect_folder
from sparsefit.recovery.run_files import ADAPTER_FOLDER, REPORT_FILE, TRAINED_BASE_FOLDER, read_state
from sparsefit.reporting.card import Part, model_card
from sparsefit.reporting.report import read_json
from sparsefit.saved_models import inspect_whole

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_ADAPTER_CONFIG = "adapter_config.json"
_OTHERS = {
    MODEL_FOLDER: "its adapter does not merge without a loss, or nothing was trained: push the adapter or the base "
    "(--what), or write one by `sparsefit merge`",
    ADAPTER_FOLDER: "it trained none, or all of the model: push the model or the base (--what)",
    BASE_FOLDER: "it was moved or deleted: put it back there",
}


def push_to_hub(run: str | Path, repo_id: str, private: bool = False, what: Part = "model") -> str:
    """Upload a part of a finished run to the hub; the repository is created if it does not exist.

    The masks and a model card written from the report are uploaded with the files of the model. Files of the same names
    in the repository are replaced.

    Args:
        run: The run folder.
        repo_id: The repository, OWNER/NAME.
        private: Whether a new repository is private; an existing one is not changed.
        what: "model", the recovered model; "base", the pruned model before recovery; "adapter", the adapter alone.

    Returns:
        The URL of the repository.

    Raises:
        RunFolderError: if the run is not finished, has no such part, or a file is damaged or was changed.
        MaskError: if pruned weights are not zero.
        DivergenceError: if a weight is NaN or infinite.
        HubError: if there is no token, the hub cannot be reached, or it refuses the upload.
    """
    run = Path(run)
    if what not in ("model", "base", "adapter"):
        raise ConfigError(f"there is no {what!r} to push: the choices are model, base and adapter")
    _check_finished(run)
    part = _part(run, what)
    _check_weights(run, part)
    api = _client()
    with tempfile.TemporaryDirectory() as staged:
        _stage(run, part, what, Path(staged))
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            message = f"The {what} of the sparsefit run {run.name}"
            api.upload_folder(repo_id=repo_id, folder_path=staged, commit_message=message)
        except Exception as error:  # the error classes of the hub client differ between its versions
            told = " ".join(str(error).split()) or type(error).__name__
            raise HubError(
                f"{run} was not pushed to {repo_id!r}: {told}. See that the name is OWNER/NAME and that the token may "
                "write there (`hf auth whoami`)"
            ) from error
    return str(url)


def _check_finished(run: Path) -> None:
    if not (run / REPORT_FILE).is_file():
        raise RunFolderError(f"there is no finished run in {run}: it has no {REPORT_FILE}. Give a run folder")
    state, status = read_state(run), read_json(run / REPORT_FILE).get("status")
    if status != "finished" or (state is not None and state.name != "finished"):
        raise RunFolderError(
            f"the run in {run} is not finished ({state.name if state is not None else status}), so it is not pushed: "
            f"`sparsefit fit --resume {run}` goes on with it"
        )


def _part(run: Path, what: Part) -> Path:
    """The folder of the part to push."""
    names = {"model": MODEL_FOLDER, "base": BASE_FOLDER, "adapter": ADAPTER_FOLDER}
    folder = run / names[what]
    if what == "base" and (run / TRAINED_BASE_FOLDER).is_dir():
        folder = run / TRAINED_BASE_FOLDER
    if not folder.is_dir():
        raise RunFolderError(f"the run in {run} has no {folder.name}/: {_OTHERS[names[what]]}")
    return folder


def _check_weights(run: Path, part: Path) -> None:
    """Check that no file of the run is damaged, and that pruned weights are zero in the part to push."""
    inspection = inspect_whole(run)
    if part.name in (BASE_FOLDER, TRAINED_BASE_FOLDER):
        inspection = inspect_folder(part)
    if inspection.broken:
        raise MaskError(
            f"{part} is not pushed: {len(inspection.broken)} of its masks do not hold (`sparsefit inspect`)"
        )
    if inspection.nonfinite:
        raise DivergenceError(f"{part} is not pushed: it has numbers that are NaN or infinite (`sparsefit inspect`)")


def _client() -> HfApi:
    """The hub client, after a check for a token and a network."""
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise HubError("there is no token of the Hugging Face hub: `hf auth login`, or set HF_TOKEN to one that writes")
    if problem := hub_problem():
        raise HubError(f"the Hugging Face hub cannot be used: {problem}")
    return HfApi()


def _stage(run: Path, part: Path, what: Part, folder: Path) -> None:
    """Collect the files to upload in a folder, as links."""
    files = [path for path in part.rglob("*") if path.is_file() and path.name not in (SUMS_FILE, "README.md")]
    for file in files:
        place = folder / file.relative_to(part)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(file.resolve())
    if (run / MASKS_FILE).is_file() and not (folder / MASKS_FILE).exists():
        (folder / MASKS_FILE).symlink_to((run / MASKS_FILE).resolve())
    library = "peft" if what == "adapter" else "transformers" if (part / "config.json").is_file() else None
    (folder / "README.md").write_text(model_card(read_json(run / REPORT_FILE), what, library), encoding="utf-8")
    config = folder / _ADAPTER_CONFIG
    if config.exists():  # it holds the local path of the base, which is removed
        settings = json.loads(config.read_text(encoding="utf-8"))
        config.unlink()
        config.write_text(json.dumps(settings | {"base_model_name_or_path": None}, indent=2), encoding="utf-8")
