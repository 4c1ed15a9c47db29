"""Suites: recording, scoring, entries of a leaderboard and their page."""

from __future__ import annotations

import hashlib
import json
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from servegym.cli import main
from servegym.errors import ConfigError
from servegym.evaluate.leaderboard import (
    ENTRIES,
    leaderboard_table,
    make_entry,
    ranked,
    read_entries,
    recorded_entries,
    total,
    write_entry,
)
from servegym.evaluate.suite import (
    FIRST_TEST_SEED,
    FIRST_VALIDATION_SEED,
    Reference,
    load_record,
    load_suite,
    play,
    reference,
    suite_names,
)
from servegym.export.shipped import shipped_path
from servegym.problems.keys import episode_key
from servegym.problems.requests import OBJECTIVES
from servegym.scenario import load_scenario
from servegym.train.validation import FIRST_SEED

SCRIPT = Path(__file__).parents[2] / "scripts" / "record-bench"
CROWDED = {
    "name": "crowded",
    "fleet": [{"gpu": "H100-SXM-80GB"}, {"gpu": "L40S", "count": 2}],
    "workload": {
        "kind": "generated",
        "rate_rps": 60.0,
        "prompt": {"medians_tokens": [300.0], "max_tokens": 2000},
        "output": {"medians_tokens": [60.0], "sigmas": [0.8], "max_tokens": 300},
    },
}
TINY = {
    "name": "tiny-suite",
    "description": "Two scenarios & a control.",
    "scenarios": [
        {
            "name": "crowd",
            "scenario": "crowded.yaml",
            "regime": "crowds",
            "loads": [1.0, 2.0],
            "num_units": 60,
        },
        {"name": "jobs", "scenario": "random-dags", "regime": "jobs", "num_units": 6},
        {
            "name": "equal",
            "scenario": "homogeneous-light",
            "regime": "control",
            "num_units": 60,
            "is_control": True,
        },
    ],
    "num_test_seeds": 2,
    "bound_budget": 20,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny suite, recorded with three rules a problem."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "suite.yaml").write_text(yaml.safe_dump(TINY))
    (folder / "crowded.yaml").write_text(yaml.safe_dump(CROWDED))
    record(folder)
    return folder


def record(folder: Path, *words: str) -> None:
    script = runpy.run_path(str(SCRIPT))
    few = {"dispatch": ["round-robin", "added-delay", "mct"], "workflow": ["fifo", "srpt-cp"]}
    space = script["main"].__globals__
    space["rules_of"] = lambda problem: few[problem.name]
    space["STARTS"] = {"dispatch": ("mct-oracle",), "workflow": ("srpt-cp-oracle",)}
    argv = sys.argv
    sys.argv = ["record-bench", "--suite", str(folder), *words]
    try:
        script["main"]()
    finally:
        sys.argv = argv


@pytest.fixture(scope="module")
def suite(folder):
    return load_suite(str(folder))


@pytest.fixture(scope="module")
def recorded(suite):
    return load_record(suite)


def test_share_of_the_headroom_is_paired_with_what_was_recorded():
    there = Reference(OBJECTIVES["latency"], "rule", np.array([10.0, 8.0]), np.array([8.0, 6.0]))
    score = there.score(np.array([9.0, 7.5]))
    assert score.share.value == pytest.approx(1.5 / 4.0)
    assert score.ratio.value == pytest.approx(np.sqrt(0.9 * 7.5 / 8.0))
    assert score.mean == pytest.approx(8.25)


def test_splits_are_apart():
    assert FIRST_VALIDATION_SEED == FIRST_SEED < 1_000_000 < FIRST_TEST_SEED


def test_record_has_rules_bounds_and_where_they_come_from(suite, recorded):
    assert set(recorded["scenarios"]) == {"crowd", "jobs", "equal"}
    assert set(recorded["scenarios"]["crowd"]) == {"1", "2"}
    found = recorded["scenarios"]["crowd"]["2"]
    assert found["seeds"] == suite.seeds == [FIRST_TEST_SEED, FIRST_TEST_SEED + 1]
    assert found["bound"]["budget_episodes"] == 20
    means = {text: np.mean(row["values"]) for text, row in found["rules"].items()}
    assert found["best_rule"] == min(means, key=lambda text: means[text])
    for text in means:
        assert (
            np.array(found["bound"]["values"]) <= np.array(found["rules"][text]["values"])
        ).all()
    for made in (found["bound"], found["rules"]["mct"]):
        assert made["recorded_by"]["command"].startswith("scripts/record-bench")
        assert len(made["recorded_by"]["revision"]) >= 40


def test_best_recorded_rule_scores_nothing_and_playing_it_again_gives_the_same(suite, recorded):
    crowd = suite.scenarios[0]
    there = reference(suite, recorded, crowd, 2.0)
    row = play(suite, crowd, 2.0, [there.best])[there.best]
    np.testing.assert_array_equal(row["values"], there.rule_values)
    assert there.score(np.array(row["values"])).share.value == 0.0
    assert there.score(there.bound_values).share.value == 1.0


def test_entry_plays_what_its_policies_can(suite, recorded):
    entry = make_entry(suite, recorded, "mine", ["sglang", "mct"])
    assert set(entry["scenarios"]) == {"crowd", "jobs", "equal"}
    assert entry["scenarios"]["crowd"]["1"]["policy"] == "sglang"
    assert entry["scenarios"]["jobs"]["1"]["policy"] == "mct"
    one = make_entry(suite, recorded, "mine", ["added-delay"])
    assert set(one["scenarios"]) == {"crowd", "equal"}
    crowd = one["scenarios"]["crowd"]
    shares = [crowd[load]["headroom"]["value"] for load in ("1", "2")]
    # the jobs are not played and count as 0, the control does not count
    assert total(suite, one) == pytest.approx(max(-1.0, np.mean(shares)) / 2)


def test_entries_of_recorded_rules_are_what_playing_them_gives(suite, recorded):
    by_name = {entry["name"]: entry for entry in recorded_entries(suite, recorded)}
    assert set(by_name) == {"round-robin", "added-delay", "mct", "fifo", "srpt-cp"}
    played = make_entry(suite, recorded, "fifo", ["fifo"])
    mine, theirs = (e["scenarios"]["jobs"]["1"] for e in (played, by_name["fifo"]))
    for key in ("values", "headroom", "ratio", "mean", "reference"):
        assert mine[key] == theirs[key]


def test_a_policy_that_plays_nothing_is_refused(suite, recorded):
    with pytest.raises(ConfigError, match="did you mean added-delay"):
        make_entry(suite, recorded, "typo", ["added-delai"])
    with pytest.raises(ConfigError, match="plays nothing that those named before it"):
        make_entry(suite, recorded, "two", ["round-robin", "added-delay"])


def test_changed_scenario_is_refused(tmp_path, folder, recorded):
    (tmp_path / "suite.yaml").write_text((folder / "suite.yaml").read_text())
    changed = {**CROWDED, "workload": {**CROWDED["workload"], "rate_rps": 61.0}}
    (tmp_path / "crowded.yaml").write_text(yaml.safe_dump(changed))
    suite = load_suite(str(tmp_path))
    with pytest.raises(ConfigError, match="is not what was recorded"):
        reference(suite, recorded, suite.scenarios[0], 1.0)
    with pytest.raises(ConfigError, match="nothing is recorded of tiny-suite"):
        load_record(suite)


def test_search_is_made_again_with_the_recorded_rules(tmp_path, folder, recorded):
    for name in ("suite.yaml", "crowded.yaml", "recorded.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    more = (tmp_path / "suite.yaml").read_text().replace("bound_budget: 20", "bound_budget: 60")
    (tmp_path / "suite.yaml").write_text(more)
    record(tmp_path, "--only", "crowd", "--bounds")
    before, after = (
        json.loads((place / "recorded.json").read_text()) for place in (folder, tmp_path)
    )
    old, new = (x["scenarios"]["crowd"]["2"] for x in (before, after))
    assert new["rules"] == old["rules"]
    assert new["bound"]["budget_episodes"] == 60
    assert np.mean(new["bound"]["values"]) < np.mean(old["bound"]["values"])
    assert after["scenarios"]["jobs"] == before["scenarios"]["jobs"]


def test_a_rule_is_added_to_what_was_recorded(tmp_path, folder, recorded):
    for name in ("suite.yaml", "crowded.yaml", "recorded.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    record(tmp_path, "--only", "equal", "--rules", "least-outstanding")
    old, new = (
        json.loads((place / "recorded.json").read_text())["scenarios"]["equal"]["1"]
        for place in (folder, tmp_path)
    )
    assert list(new["rules"]) == sorted([*old["rules"], "least-outstanding"])
    assert {text: new["rules"][text] for text in old["rules"]} == old["rules"]
    assert new["bound"] == old["bound"]
    means = {text: np.mean(row["values"]) for text, row in new["rules"].items()}
    assert means[new["best_rule"]] == min(means.values())


def test_command_writes_entries_and_the_page(tmp_path, folder, capsys):
    pytest.importorskip("matplotlib")
    main(f"leaderboard --suite {folder} --policies random --out {tmp_path}".split())
    assert "random" in capsys.readouterr().out
    entry = json.loads((tmp_path / "random.json").read_text())
    assert entry["schema"] == "servegym-leaderboard-entry-1"
    page = (tmp_path / "index.html").read_text()
    assert "Two scenarios &amp; a control." in page
    assert page.count('<tr class="learned">') == 1
    assert page.count('<tr class="oracle">') == 5
    assert "http" not in page.replace("http://www.w3.org", "")


def test_entries_that_come_with_a_suite_are_shown_until_one_of_that_name_is_made(
    tmp_path, folder, suite, recorded, capsys
):
    pytest.importorskip("matplotlib")
    mine, out = tmp_path / "suite", tmp_path / "out"
    shutil.copytree(folder, mine)
    write_entry(make_entry(suite, recorded, "guest", ["random"]), mine / ENTRIES)
    main(f"leaderboard --suite {mine} --out {out}".split())
    assert capsys.readouterr().out.count("guest") == 1
    assert (out / "index.html").read_text().count('<tr class="learned">') == 1
    assert not (out / "guest.json").exists()
    main(f"leaderboard --suite {mine} --name guest --policies mct --out {out}".split())
    assert json.loads((out / "guest.json").read_text())["policies"][0]["policy"] == "mct"
    assert (out / "index.html").read_text().count('<tr class="learned">') == 1


def test_entries_of_another_suite_are_refused(tmp_path, suite, recorded):
    entry = make_entry(suite, recorded, "Mine & yours", ["fifo"])
    path = write_entry(entry, tmp_path)
    assert path.name == "mine-yours.json"
    assert read_entries(suite, tmp_path) == [entry]
    assert leaderboard_table(suite, [entry]).row_count == 1
    path.write_text(json.dumps({**entry, "suite": "other"}))
    with pytest.raises(ConfigError, match="is an entry of other"):
        read_entries(suite, tmp_path)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="its schema must be"):
        read_entries(suite, tmp_path)


def test_a_name_without_policies_is_refused(tmp_path, folder):
    with pytest.raises(SystemExit):
        main(f"leaderboard --suite {folder} --name mine --out {tmp_path}".split())


def test_an_episode_is_the_same_where_processors_draw_other_last_bits():
    episode = load_scenario("agent-sessions").episode(0, num_requests=20)

    def key(stretch: float) -> bytes:
        table = replace(episode.table, delay_s=episode.table.delay_s * stretch)
        return episode_key(replace(episode, table=table), noisy=False)

    assert episode.table.delay_s.max() > 1.0
    assert key(1.0 + 1e-15) == key(1.0)
    assert key(1.0 + 1e-4) != key(1.0)


@pytest.mark.parametrize(
    ("name", "shipped"),
    [
        ("servegym-bench-v1", ["generalist", "limits", "tail"]),
        ("servegym-bench-v2", ["bursts", "generalist", "held", "limits", "tail"]),
    ],
)
def test_entries_that_come_with_a_suite_are_of_the_policies_that_come_with_servegym(name, shipped):
    suite = load_suite(name)
    entries = read_entries(suite, suite.folder / ENTRIES)
    assert [entry["name"] for entry in entries] == shipped
    for entry in entries:
        path = shipped_path(entry["name"])
        assert path is not None
        assert entry["policies"][0]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_unknown_suite_is_refused(tmp_path):
    (tmp_path / "suite.yaml").write_text("name: mine\nnum_seeds: 3\n")
    with pytest.raises(ConfigError, match="unknown key num_seeds; did you mean num_test_seeds"):
        load_suite(str(tmp_path))
    with pytest.raises(ConfigError, match="servegym-bench-v1"):
        load_suite("servegym-bench-v9")


SUITES = ("servegym-bench-v1", "servegym-bench-v2")


def test_suites_come_with_servegym():
    assert suite_names() == list(SUITES)


@pytest.mark.parametrize("name", SUITES)
def test_bundled_suite_has_twelve_scenarios_two_of_them_controls(name):
    suite = load_suite(name)
    assert len(suite.scenarios) == 12
    assert sum(scenario.is_control for scenario in suite.scenarios) == 2
    problems = {suite.pose(scenario)[0].name for scenario in suite.scenarios}
    assert problems == {"dispatch", "order", "workflow"}


def test_a_router_may_hold_in_two_scenarios_of_the_second_suite():
    suite = load_suite("servegym-bench-v2")
    posed = [(scenario.name, suite.pose(scenario)) for scenario in suite.scenarios]
    may_hold = [
        name for name, (problem, it) in posed if problem.name == "dispatch" and it.actions.hold
    ]
    assert may_hold == ["bursts", "short-kv"]


@pytest.mark.parametrize("name", SUITES)
def test_bundled_suite_is_recorded_as_a_whole(name):
    suite = load_suite(name)
    record = load_record(suite)
    assert set(record["scenarios"]) == {scenario.name for scenario in suite.scenarios}
    for scenario in suite.scenarios:
        for load in scenario.loads:
            there = reference(suite, record, scenario, load)
            found = record["scenarios"][scenario.name][f"{load:g}"]
            assert found["seeds"] == suite.seeds
            assert len(there.rule_values) == len(there.bound_values) == suite.num_test_seeds
            means = {text: np.mean(row["values"]) for text, row in found["rules"].items()}
            choose = max if there.objective.more_is_better else min
            assert means[there.best] == choose(means.values())
            share = there.score(there.bound_values).share.value
            assert share == 1.0 or scenario.is_control


@pytest.mark.parametrize("name", SUITES)
def test_who_plays_less_than_half_stands_behind(name):
    suite = load_suite(name)
    order = ranked(suite, recorded_entries(suite, load_record(suite)))
    played = [len(entry["scenarios"]) for entry in order]
    first_part = next(place for place, count in enumerate(played) if 2 * count < 12)
    assert 0 < first_part < len(order)
    for part in (order[:first_part], order[first_part:]):
        totals = [total(suite, entry) for entry in part]
        assert totals == sorted(totals, reverse=True)
    assert max(played[first_part:]) < 6 <= min(played[:first_part])


def test_bundled_record_is_what_the_simulator_plays():
    suite = load_suite("servegym-bench-v2")
    record = load_record(suite)
    for name, rule in (("mean", "round-robin"), ("orders", "fcfs"), ("jobs", "fifo")):
        scenario = next(s for s in suite.scenarios if s.name == name)
        values = play(suite, scenario, 1.0, [rule])[rule]["values"]
        recorded = record["scenarios"][name]["1"]["rules"][rule]["values"]
        # processors differ in the last bit, which a crowd makes more of
        assert values == pytest.approx(recorded, rel=1e-3)
