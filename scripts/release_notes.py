#!/usr/bin/env python3
"""Check what `scripts/release` has built, and write the notes of the version beside it.

Notes are the changelog's section of the version. While there are lines under *Unreleased* the
files are a rehearsal, which is said, and the notes are those lines.
"""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff")


def section(changelog: str, title: str) -> str:
    """Return the lines under `## [title]`, empty if there are none."""
    found = re.search(
        rf"^## \[{re.escape(title)}\].*?\n(.*?)(?=^## \[|\Z)", changelog, re.DOTALL | re.MULTILINE
    )
    return found[1].strip() if found else ""


def notes(changelog: str, version: str) -> tuple[str, bool]:
    """Return the notes of a version, and whether they are only a rehearsal's."""
    unreleased = section(changelog, "Unreleased")
    if unreleased:
        return f"# servegym, unreleased changes since {version}\n\n{unreleased}\n", True
    own = section(changelog, version)
    if not own:
        sys.exit(f"CHANGELOG.md must have a section [{version}], the version in __init__.py")
    return f"# servegym {version}\n\n{own}\n", False


def complaints(sdist: list[str], wheel: list[str], package: list[str]) -> list[str]:
    """Say what is wrong with the files of a release.

    Args:
        sdist: Names in the source distribution, below its folder.
        wheel: Names in the wheel.
        package: Files of the package in the working tree, as the wheel names them.
    """
    found = [f"the sdist lacks {name}" for name in NEEDED if name not in sdist]
    found += [f"the sdist holds {name}" for name in sdist if name.startswith(("tests/", "runs/"))]
    found += [f"the wheel lacks {name}" for name in sorted({*package} - {*wheel})]
    shipped = (name for name in wheel if name.startswith("servegym/"))
    found += [f"the wheel holds {name}" for name in sorted({*shipped} - {*package})]
    return found


def package_files() -> list[str]:
    """List the files of the package in the working tree; the five folders are links in it."""
    source = ROOT / "src" / "servegym"
    folders = [path for path in source.iterdir() if path.is_dir() and path.name != "__pycache__"]
    files = [path for path in source.iterdir() if path.is_file()]
    files += [path for folder in folders for path in sorted(folder.resolve().rglob("*"))]
    named = []
    for path in files:
        if path.is_file() and "__pycache__" not in path.parts:
            top = source if path.is_relative_to(source) else ROOT
            named.append(str(PurePosixPath("servegym", *path.relative_to(top).parts)))
    return sorted(named)


def main() -> None:
    """Check and write."""
    folder = Path(sys.argv[1])
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    version = sdist.name.removeprefix("servegym-").removesuffix(".tar.gz")
    with tarfile.open(sdist) as archive:
        names = [member.name.partition("/")[2] for member in archive if member.isfile()]
    with zipfile.ZipFile(wheel) as archive:
        shipped = archive.namelist()
    found = complaints(names, shipped, package_files())
    if not wheel.name.startswith(f"servegym-{version}-"):
        found.append(f"{wheel.name} is of another version than {sdist.name}")
    if found:
        sys.exit("\n".join(found))
    text, rehearsal = notes((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), version)
    (folder / "RELEASE_NOTES.md").write_text(text, encoding="utf-8")
    print(f"sdist: {len(names)} files; wheel: {len(shipped)} files, as in the working tree")
    if rehearsal:
        print("a rehearsal: CHANGELOG.md has lines under Unreleased; move them under a version")


if __name__ == "__main__":
    main()
