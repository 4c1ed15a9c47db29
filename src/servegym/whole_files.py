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
    drafts: dict[Path, Path] = {}
    path = Path()
    try:
        for path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            place = path.resolve()  # a link stays one
            if place.exists() and not place.is_file():  # such as /dev/stdout, or a folder
                place.write_bytes(files[path])
                continue
            draft = drafts[path] = place.with_name(f".{place.name}.part")
            with draft.open("wb") as file:
                file.write(files[path])
                file.flush()
                os.fsync(file.fileno())
        for path, draft in drafts.items():
            os.replace(draft, path.resolve())
        for folder in {draft.parent for draft in drafts.values()}:
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


def require_writable(folder: Path) -> None:
    """Try whether a folder can be written, or made, before any work is done for it.

    Raises:
        OutputError: If not.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    probe = there / ".servegym.part"
    try:
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
