"""Two results of the bench: what changed by more than their spreads."""

from __future__ import annotations

import json

import pytest

from servegym.commands.bench import spread
from servegym.commands.bench_changes import changes, read_result, write_result
from servegym.errors import ConfigError


def verdicts(before, after):
    return {change.name: change.verdict for change in changes(before, after)}


def test_only_ranges_that_do_not_meet_are_a_change():
    before = {
        "requests_per_s": {"8": spread([10.0, 11.0, 12.0]), "64": spread([5.0, 6.0, 7.0])},
        "env_decisions_per_s": spread([100.0, 110.0]),
        "warm_start_s": spread([2.0, 2.2, 2.4]),
        "cost_growth_8_to_512": spread([2.0, 2.1]),
        "cold_start_s": spread([60.0]),
        "gone_per_s": spread([1.0, 2.0]),
    }
    after = {
        "requests_per_s": {"8": spread([12.0, 13.0, 14.0]), "64": spread([7.1, 8.0, 9.0])},
        "env_decisions_per_s": spread([80.0, 99.0]),
        "warm_start_s": spread([2.5, 2.6, 2.7]),
        "cost_growth_8_to_512": spread([1.3, 1.4]),
        "cold_start_s": spread([30.0]),
        "new_per_s": spread([1.0, 2.0]),
    }
    assert verdicts(before, after) == {
        "requests_per_s @ 8": "within the spread",
        "requests_per_s @ 64": "better",
        "env_decisions_per_s": "worse",
        "warm_start_s": "worse",
        "cost_growth_8_to_512": "better",
        "cold_start_s": "measured once",
    }


def test_a_result_is_read_as_it_was_written(tmp_path):
    result = {"requests_per_s": {"8": spread([1.0, 2.0])}, "ppo_decisions_per_s": spread([3.0])}
    write_result(tmp_path / "bench.json", result)
    assert read_result(tmp_path / "bench.json") == result


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[1, 2]",
        json.dumps({"cost_growth_8_to_512": 2.1}),
        json.dumps({"warm_start_s": {"median": 1.0}}),
        json.dumps({"warm_start_s": {"median": "1", "min": 1, "max": 1, "repetitions": 1}}),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, text):
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bench.json is no result to compare with"):
        read_result(path)
    with pytest.raises(ConfigError, match=r"servegym bench --json"):
        read_result(tmp_path / "missing.json")
