"""Learned policies that come with servegym, by name."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from servegym.export.manifest import read_manifest

_FOLDER, _FILE = "policies", "policy.onnx"


def shipped_names() -> list[str]:
    """Names of the policies in `assets/policies`."""
    folders = resources.files("servegym.assets").joinpath(_FOLDER).iterdir()
    return sorted(folder.name for folder in folders if folder.is_dir())


def shipped_text(name: str) -> str:
    """Say in a sentence what a policy that comes with servegym is."""
    path = shipped_path(name)
    assert path is not None
    manifest = read_manifest(path)
    return f"Learned on {manifest.scenario} by {manifest.training['algorithm']}; see its card."


def shipped_path(name: str) -> Path | None:
    """File of a policy that comes with servegym, `None` if there is none of that name."""
    if name not in shipped_names():
        return None
    return Path(str(resources.files("servegym.assets").joinpath(_FOLDER, name, _FILE)))
