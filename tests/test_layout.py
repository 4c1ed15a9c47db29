"""The literal top-level folders, the links to them and the list of packages that ships."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import servegym

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "servegym"
FOLDERS = ("agents", "assets", "baselines", "envs", "train")


@pytest.fixture(scope="module")
def packaging() -> dict[str, object]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return settings["tool"]["setuptools"]


def packages_under(folder: Path, name: str) -> set[str]:
    """Names of the packages in a folder, links not followed."""
    found = set()
    for place, _, files in os.walk(folder):
        if "__init__.py" in files:
            found.add(".".join([name, *Path(place).relative_to(folder).parts]))
    return found


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_is_real_at_the_top_and_a_relative_link_in_the_package(name):
    assert (ROOT / name).is_dir()
    assert not (ROOT / name).is_symlink()
    assert (SOURCE / name).is_symlink()
    assert str((SOURCE / name).readlink()) == f"../../{name}"


def test_no_other_link_is_in_the_package():
    assert {path.name for path in SOURCE.iterdir() if path.is_symlink()} == set(FOLDERS)


def test_every_package_is_listed_and_every_listed_package_exists(packaging):
    there = packages_under(SOURCE, "servegym")
    for name in FOLDERS:
        there |= packages_under(ROOT / name, f"servegym.{name}")
    listed = packaging["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == there


def test_package_dir_maps_the_package_and_the_five_folders(packaging):
    assert packaging["package-dir"] == {
        "servegym": "src/servegym",
        **{f"servegym.{name}": name for name in FOLDERS},
    }


def test_every_asset_matches_a_shipped_pattern(packaging):
    patterns = packaging["package-data"]["servegym.assets"]
    found = [path for path in (ROOT / "assets").rglob("*") if path.is_file()]
    data = [path for path in found if path.suffix not in (".py", ".pyc")]
    assert data
    for path in data:
        assert any(path.match(pattern.removeprefix("**/")) for pattern in patterns), path


@pytest.mark.parametrize("name", FOLDERS)
def test_bare_import_is_refused(monkeypatch, name):
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(ImportError, match=f"import servegym.{name}, not {name}"):
        importlib.import_module(name)
    assert name not in sys.modules


def test_importing_everything_loads_no_module_twice():
    names = [m.name for m in pkgutil.walk_packages(servegym.__path__, "servegym.")]
    assert len(names) > 60
    for name in names:
        importlib.import_module(name)
    assert not set(FOLDERS) & set(sys.modules)


def test_serving_loads_neither_pytorch_nor_gymnasium():
    script = (
        "import sys; sys.modules.update(torch=None, gymnasium=None)\n"
        "import servegym.serve.router.app, servegym.serve.engine.server, servegym.serve.vllm.plugin"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_tests_are_no_packages():
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_nothing_tells_to_install_what_no_index_has():
    """The package is on no index: a checkout works, and so do the names of what it needs."""
    told = [
        (path.relative_to(ROOT), line)
        for folder in ("src", "envs", "agents", "baselines", "train", "docs", "examples", "scripts")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".py", ".md", ".yaml", "") and path.is_file()
        for line in path.read_text().splitlines()
        if re.search(r"pip install [^/.]*\bservegym\b(?! in)", line.split("#")[0])
    ]
    assert told == []
