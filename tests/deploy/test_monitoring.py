"""Alerts and dashboard ask for nothing that the router's page does not have."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import promql_parser as promql
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from ..serve.running import run, running, until  # noqa: TID252 - tests are no package

ROOT = Path(__file__).parents[2]
FILES = ROOT / "deploy" / "chart" / "files"
RULES = yaml.safe_load((FILES / "rules.yaml").read_text())
DASHBOARD = json.loads((FILES / "dashboard.json").read_text())
#: What Prometheus itself adds to every series.
TARGET = {"job", "instance"}
STREAM = {"model": "m", "prompt": "hello there", "max_tokens": 5, "stream": True}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> dict[str, set[str]]:
    """Names of all series of a router that has seen everything, with their labels."""
    found: dict[str, set[str]] = {}
    settings = {
        "dispatch": {
            "slo_classes": [{"name": "chat", "ttft_s": 1.0}],
            "log": {"folder": str(tmp_path_factory.mktemp("log"))},
        },
        "request": {"retry_share": 0.0, "retry_reserve": 0},
        "peers": {"port": 0, "addresses": ["127.0.0.1:9"]},
    }

    async def test() -> None:
        async with running(num_workers=1, **settings) as it:
            it.router.dispatcher.runtime.features_out["prompt_tokens"] = 1
            await it.post(STREAM)
            it.replicas[0].mode = it.replicas[1].mode = "die_first"  # tried again
            await it.post(STREAM)
            it.replicas[0].mode = it.replicas[1].mode = 500  # not tried again
            await it.post(STREAM)
            await until(it.idle)
            # workers wait a little before they tell of answers
            await until(lambda: it.router.telemetry.requests.total() == 3)
            _, text = await it.get("/metrics")
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)

    run(test)
    return found


def rules() -> Iterator[tuple[str, str]]:
    for group in RULES["groups"]:
        for rule in group["rules"]:
            yield rule.get("alert") or rule["record"], rule["expr"]


def panels() -> Iterator[tuple[str, str]]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for note in DASHBOARD["annotations"]["list"]:
        yield note["name"], note["expr"]


def recorded() -> dict[str, set[str]]:
    """Names of recorded series, with the labels that their sums keep."""
    names = {}
    for name, expr in rules():
        if ":" in name:
            (by,) = set(re.findall(r"sum by \((.*?)\)", expr))
            names[name] = {label.strip() for label in by.split(",")}
    return names


def unknown(expr: str, page: dict[str, set[str]]) -> list[str]:
    """Name what an expression asks for and the page does not have."""
    wrong: list[str] = []

    def visit(node: promql.Expr) -> set[str]:
        """Return the labels that the node's series may have."""
        if isinstance(node, promql.VectorSelector):
            if node.name not in page:
                wrong.append(node.name)
                return TARGET
            labels = page[node.name] | TARGET
            wrong.extend(
                f"{node.name}{{{matcher.name}}}"
                for matcher in node.matchers.matchers
                if matcher.name not in labels
            )
            return labels
        if isinstance(node, promql.MatrixSelector):
            return visit(node.vector_selector)
        if isinstance(node, promql.AggregateExpr):
            labels = visit(node.expr)
            by = set(node.modifier.labels) if node.modifier else set()
            wrong.extend(f"by ({label})" for label in sorted(by - labels))
            return by
        if isinstance(node, promql.Call):
            found = [visit(argument) for argument in node.args]
            return set().union(*found)
        if isinstance(node, promql.BinaryExpr):
            left, right = visit(node.lhs), visit(node.rhs)
            matching = node.modifier.matching if node.modifier else None
            on = set(matching.labels) if matching else set()
            wrong.extend(f"on ({label})" for label in sorted(on - (left & right)))
            return left or right  # a number has no labels
        if isinstance(node, promql.ParenExpr):
            return visit(node.expr)
        assert isinstance(node, promql.NumberLiteral), type(node)
        return set()

    visit(promql.parse(expr.replace("$__rate_interval", "5m")))
    return wrong


def test_a_name_or_label_that_is_not_there_is_found(page):
    assert unknown("servegym_replica_up == 0", page) == []
    assert unknown("servegym_replica_upp == 0", page) == ["servegym_replica_upp"]
    assert unknown('servegym_replica_up{tenant="a"}', page) == ["servegym_replica_up{tenant}"]
    assert unknown("sum by (tenant) (rate(servegym_decisions_total[5m]))", page) == ["by (tenant)"]
    joined = "servegym_replica_up and on (replica) servegym_shadow"
    assert unknown(joined, page) == ["on (replica)"]


@pytest.mark.parametrize("source", [rules, panels])
def test_every_expression_asks_for_what_is_on_the_page(page, source):
    expressions = list(source())
    assert len(expressions) > 20
    known = {**page, **recorded()}
    assert {name: found for name, expr in expressions if (found := unknown(expr, known))} == {}


def test_panels_are_whole_and_do_not_overlap():
    shown = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert len(shown) > 20
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        covered = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not covered & cells, panel["title"]
        cells |= covered
    assert [panel["title"] for panel in shown if not panel["description"]] == []


def test_what_to_do_about_each_alert_is_on_the_page():
    text = (ROOT / "docs" / "operations.md").read_text()
    alerts = [name for name, _ in rules() if ":" not in name]
    assert len(alerts) == len(set(alerts)) > 15
    assert [name for name in alerts if f"`{name}`" not in text] == []
    severities = {
        rule["labels"]["severity"]
        for group in RULES["groups"]
        for rule in group["rules"]
        if "alert" in rule
    }
    assert severities == {"page", "ticket"}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize(
    "words", [("check", "rules", FILES / "rules.yaml"), ("test", "rules", "rules_test.yaml")]
)
def test_promtool_agrees(words):
    said = subprocess.run(
        ["promtool", *map(str, words)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert said.returncode == 0, said.stdout + said.stderr
