"""A key that is given twice is refused; all else is PyYAML's and Python's."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from servegym.documents import load_json, load_yaml
from servegym.errors import ConfigError
from servegym.scenario import parse_scenario

SCENARIOS = Path(__file__).parents[1] / "assets" / "scenarios"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: 2\na: 3", 3),
        ("x:\n  a: 1\n  'a': 1", 3),
        ("- {a: 1}\n- {b: {c: 1, c: 1}}", 2),
        ("1: a\n0x1: b", 2),
    ],
)
def test_a_key_that_is_given_twice_is_named_with_its_line(text, line):
    with pytest.raises(yaml.MarkedYAMLError, match="is given twice") as refused:
        load_yaml(text)
    assert refused.value.problem_mark.line + 1 == line


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a: {b: 1}\nc: {b: 2}",
        "base: &base {a: 1, b: 2}\nmore: {<<: *base, b: 3}",
        "[1, 2.5, null, yes, 2026-11-29]",
    ],
)
def test_the_rest_is_as_ever(text):
    assert load_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize("text", ["[", "{a: ", "- ", "? "])
def test_nesting_of_any_depth_ends_no_process(text):
    with pytest.raises(yaml.YAMLError, match=r"nested too deeply|expected|mapping"):
        load_yaml(text * 30_000)


@pytest.mark.parametrize(
    "text", ["9" * 5000, "2026-99-99", "? [a]\n: 1", "a: !!python/object:os.system x", "a: ["]
)
def test_what_is_no_plain_value_is_refused(text):
    with pytest.raises(yaml.YAMLError):
        load_yaml(text)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": ' * 100_000, "9" * 5000, '{"a": 1, "a": 2}']
)
def test_json_of_any_kind_is_read_or_refused(text):
    with pytest.raises(ValueError):
        load_json(text)


def test_bundled_scenarios_have_no_key_twice():
    paths = list(SCENARIOS.rglob("*.yaml"))
    assert paths
    for path in paths:
        assert load_yaml(path.read_text()) == yaml.safe_load(path.read_text())


def test_a_scenario_with_a_key_twice_is_refused():
    text = "name: a\nmodel: Llama-3.1-8B\nmodel: Llama-3.1-70B\n"
    with pytest.raises(ConfigError, match=r"mine, line 3: .*'model' is given twice"):
        parse_scenario(text, "mine")
