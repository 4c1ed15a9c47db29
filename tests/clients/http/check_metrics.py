"""Metrics pages by other people's parsers and linters."""

from __future__ import annotations

import math
import shutil
import subprocess

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from .served import KEY, MODEL, fetch


@pytest.fixture(scope="module")
def pages(served) -> dict[str, str]:
    client = openai.OpenAI(base_url=served.base_url, api_key=KEY, max_retries=0)
    for i in range(8):
        client.completions.create(model=MODEL, prompt=f"{i}", max_tokens=4)
    list(client.completions.create(model=MODEL, prompt="x", max_tokens=4, stream=True))
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt="x", max_tokens=-4)
    return {"router": served.metrics(), "engine": fetch(f"{served.engines[0]}/metrics")}


@pytest.mark.parametrize("whose", ["router", "engine"])
def test_the_page_is_read_by_prometheus_client(pages, whose):
    families = {family.name: family for family in text_string_to_metric_families(pages[whose])}
    assert len(families) > 10
    for family in families.values():
        assert family.type in ("counter", "gauge", "histogram"), family.name
        assert family.documentation, family.name
        labels = [(s.name, tuple(sorted(s.labels.items()))) for s in family.samples]
        assert len(labels) == len(set(labels)), f"{family.name} has a sample twice"
        if family.type == "histogram":
            buckets = [(float(s.labels["le"]), s.value) for s in family.samples if "le" in s.labels]
            assert buckets == sorted(buckets)
            assert buckets[-1][0] == math.inf
            count = next(s.value for s in family.samples if s.name.endswith("_count"))
            assert buckets[-1][1] == count
        if family.type == "counter":
            assert all(s.name.endswith("_total") for s in family.samples)
    if whose == "router":
        decisions = sum(s.value for s in families["servegym_decisions"].samples)
        assert decisions >= 9


@pytest.mark.parametrize("whose", ["router", "engine"])
def test_promtool_finds_nothing(pages, whose):
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not there: apt-get install prometheus")
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=pages[whose], text=True, capture_output=True
    )
    # vLLM's names have colons, which the linter keeps for recording rules
    found = [line for line in (done.stdout + done.stderr).splitlines() if "':'" not in line]
    assert found == []
