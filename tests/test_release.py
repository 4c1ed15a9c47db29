"""One version everywhere, and releases that say what is in them."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import yaml

import servegym

ROOT = Path(__file__).parents[1]
CHANGELOG = """# Changelog

## [Unreleased]
{unreleased}
## [0.2.0] - 2030-01-02
### Added
- Two.

## [0.1.0] - 2029-01-02
### Added
- One.
"""


@pytest.fixture(scope="module")
def release():
    return runpy.run_path(str(ROOT / "scripts" / "release_notes.py"))


def test_the_citation_names_the_version_and_its_date():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == servegym.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    heading = re.search(rf"^## \[{re.escape(servegym.__version__)}\] - (\S+)$", changelog, re.M)
    assert heading is not None
    assert str(citation["date-released"]) == heading[1]


def test_versions_of_the_changelog_descend():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    found = re.findall(r"^## \[(.*?)\]", changelog, re.M)
    assert found[0] == "Unreleased"
    versions = [tuple(map(int, name.split("."))) for name in found[1:]]
    assert versions
    assert versions == sorted(versions, reverse=True)


def test_notes_are_those_of_the_version(release):
    text, rehearsal = release["notes"](CHANGELOG.format(unreleased=""), "0.2.0")
    assert text == "# servegym 0.2.0\n\n### Added\n- Two.\n"
    assert not rehearsal


def test_with_unreleased_changes_it_is_a_rehearsal(release):
    text, rehearsal = release["notes"](CHANGELOG.format(unreleased="- Three.\n"), "0.2.0")
    assert text.endswith("\n\n- Three.\n")
    assert rehearsal


def test_a_version_without_a_section_is_refused(release):
    with pytest.raises(SystemExit, match=r"must have a section \[0\.3\.0\]"):
        release["notes"](CHANGELOG.format(unreleased=""), "0.3.0")


def test_files_that_lack_or_should_not_be_there_are_named(release):
    sdist = [*release["NEEDED"][1:], "tests/test_a.py"]
    wheel = ["servegym/__init__.py", "servegym/old.py", "servegym-1.dist-info/RECORD"]
    assert release["complaints"](sdist, wheel, ["servegym/__init__.py", "servegym/a.yaml"]) == [
        "the sdist lacks pyproject.toml",
        "the sdist holds tests/test_a.py",
        "the wheel lacks servegym/a.yaml",
        "the wheel holds servegym/old.py",
    ]


def test_the_package_is_listed_with_its_linked_folders(release):
    files = release["package_files"]()
    assert "servegym/py.typed" in files
    assert "servegym/envs/dispatch.py" in files
    assert "servegym/assets/gpus.yaml" in files
    assert not [name for name in files if "__pycache__" in name]
