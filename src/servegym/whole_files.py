"""Files that are there whole or not at all, whatever stops the program or fills the disk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from servegym.errors import OutputError


def write_whole(files: Mapping[Path, bytes]) -> None:
    """Write files that belong together: all are drafted, and only then take their places.

    Args:
        files: Contents by path; folders are made.

    Raises:
        OutputError: If one cannot be written; then what was there before is untouched.
    """
    drafts = {path: path.with_name(f".{path.name}.part") for path in files}
    path = Path()
    try:
        for path, draft in drafts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with draft.open("wb") as file:
                file.write(files[path])
                file.flush()
                os.fsync(file.fileno())
        for path, draft in drafts.items():
            os.replace(draft, path)
        for folder in {path.parent for path in files}:
            _sync(folder)
    except OSError as error:
        raise OutputError(unwritable(path, error)) from error
    finally:
        for draft in drafts.values():
            _remove(draft)


def unwritable(path: Path, error: OSError) -> str:
    """Say in a sentence why a file cannot be written, and what to do."""
    why = error.strerror or str(error)
    return f"{path} cannot be written ({why[:1].lower()}{why[1:]}): make room or name another place"


def make_folder(folder: Path) -> None:
    """Make a folder, and try whether it can be written.

    Raises:
        OutputError: If not.
    """
    probe = folder / ".servegym.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(unwritable(folder, error)) from error


def _sync(folder: Path) -> None:
    """Make a rename outlast a power cut; not every system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(draft: Path) -> None:
    try:
        draft.unlink(missing_ok=True)
    except OSError:
        return  # it could not be made
