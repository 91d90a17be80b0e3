"""Atomic writes of files and folders: written to a temporary neighbour, synced to disk, then moved into place.

Also checksums that show whether files are still what was written: `SHA256SUMS` in a folder (which `sha256sum -c` can
check) and a checksum inside a JSON object (its seal); and a lock that lets only one process write to a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError

from sparsefit.errors import RunFolderError, SparsefitError

SUMS_FILE = "SHA256SUMS"
LOCK_FILE = ".lock"
_SEAL = "sha256"
_PARTIAL = ".partial"
_CHUNK = 1 << 20


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `folder` at the end; after an error it is deleted.

    `folder` always has either its old or its new contents, never a mixture. Files get the permissions of the user's
    umask, and a file of checksums. If the process is killed during the replacement, the old and the new folder are both
    complete, next to `folder`.

    Raises:
        RunFolderError: if the folder cannot be written; `folder` is unchanged.
    """
    partial, old = (folder.with_name(f"{folder.name}.{what}") for what in ("partial", "old"))
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed run
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        partial.mkdir(parents=True)
        yield partial
        write_sums(partial)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(partial, folder)
        sync_folder(folder.parent)
    except SparsefitError:
        raise
    except (OSError, SafetensorError) as error:
        raise unwritable(folder, error) from error
    finally:
        with suppress(OSError):
            if old.exists() and not folder.exists():
                os.replace(old, folder)
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path whose file replaces `path` at the end; after an error it is deleted.

    Raises:
        RunFolderError: if the file cannot be written; an existing file at `path` is unchanged.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except SparsefitError:
        raise
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def is_partial(path: Path) -> bool:
    """Whether a path is a temporary file of `replacing_file`, left by a killed process.

    >>> is_partial(Path("a/.report.json.0123.partial")), is_partial(Path("a/report.json"))
    (True, False)
    """
    return path.name.startswith(".") and path.name.endswith(_PARTIAL)


def write_text(text: str, path: str | os.PathLike[str]) -> Path:
    """Write a text file atomically.

    Returns:
        The path of the file.

    Raises:
        RunFolderError: if it cannot be written; an existing file at `path` is unchanged.
    """
    path = Path(path)
    with replacing_file(path) as partial, open(partial, "x", encoding="utf-8") as file:
        file.write(text)
    return path


def unwritable(path: Path, error: BaseException) -> RunFolderError:
    """The error for a path that cannot be written."""
    return RunFolderError(
        f"{path} cannot be written: {error}. Existing files are unchanged. Free some space, or give a folder that you "
        "may write to"
    )


def write_sums(folder: Path) -> None:
    """Write the checksums of a folder's files to `SHA256SUMS` in it, and sync all files to disk."""
    names = _names(folder)
    lines = [f"{file_sum(folder / name, sync=True)}  {name}\n" for name in names]
    with open(folder / SUMS_FILE, "w", encoding="utf-8") as file:
        file.write("".join(lines))
        file.flush()
        os.fsync(file.fileno())
    rights = (folder / SUMS_FILE).stat().st_mode  # as the umask says; safetensors gives access only to the user
    for name in names:
        (folder / name).chmod(rights)
    sync_folder(folder)


def changed_files(folder: Path) -> list[str]:
    """The files of a folder that do not match their checksums or are missing; empty if the folder has no checksums."""
    if not (folder / SUMS_FILE).is_file():
        return []
    changed = []
    for line in (folder / SUMS_FILE).read_bytes().decode("utf-8", "replace").splitlines():
        expected, _, name = line.partition("  ")
        if not is_plain(name):
            return [SUMS_FILE]
        try:
            same = file_sum(folder / name) == expected
        except OSError:
            same = False
        if not same:
            changed.append(name)
    return changed


def check_sums(folder: Path) -> None:
    """Check that a folder's files match their checksums.

    Raises:
        RunFolderError: names the files that do not.
    """
    if changed := changed_files(folder):
        listed = ", ".join(str(folder / name) for name in changed[:3])
        raise RunFolderError(
            f"{listed}: not what {SUMS_FILE} says, but damaged, deleted or changed since. "
            f"Copy {folder} again from an undamaged copy; if you changed it on purpose, delete {folder / SUMS_FILE}"
        )


def is_plain(name: str) -> bool:
    """Whether a file name, read from another file, is a relative path that stays inside its folder.

    >>> is_plain("model-00001.safetensors"), is_plain("../../x"), is_plain("/etc/passwd"), is_plain("")
    (True, False, False, False)
    """
    path = PurePosixPath(name.replace("\\", "/"))
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and ":" not in path.parts[0]


def file_sum(path: Path, sync: bool = False) -> str:
    """sha256 of a file, in hex; `sync` also syncs the file to disk."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
        if sync:
            os.fsync(file.fileno())
    return found.hexdigest()


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a checksum of its other entries added.

    >>> is_sealed(sealed({"a": 1})), is_sealed(sealed({"a": 1}) | {"a": 2}), is_sealed({"a": 1})
    (True, False, True)
    """
    bare = {key: value for key, value in values.items() if key != _SEAL}
    return bare | {_SEAL: hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()}


def is_sealed(values: Mapping[str, Any]) -> bool:
    """Whether a JSON object matches its checksum; True if it has none."""
    return _SEAL not in values or sealed(values)[_SEAL] == values[_SEAL]


def lock_folder(folder: Path, what: str, wait: float = 0.0) -> BaseFileLock | None:
    """Lock a folder for this process until the lock is released or the process ends.

    Args:
        folder: The folder.
        what: What uses the folder, for the message: "run", "study".
        wait: Seconds to wait for another process to end.

    Returns:
        The lock; None, with a warning, if the file system does not support locks.

    Raises:
        RunFolderError: if another process holds the lock.
        OSError: if the folder cannot be written to.
    """
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=wait)
    except Timeout as error:
        raise RunFolderError(f"another {what} is running in {folder}: wait for it, or give another folder") from error
    except NotImplementedError:
        warnings.warn(f"the file system of {folder} knows no locks: see that no other {what} uses it", stacklevel=2)
        return None
    return lock


def _names(folder: Path) -> list[str]:
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in files if name != SUMS_FILE)


def sync_folder(folder: Path) -> None:
    """Sync a directory to disk, if the system supports it, so that new names in it survive a crash."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
