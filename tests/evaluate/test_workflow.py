"""Comparing online schedulers: metrics by hand, pairs, tuning, the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from servegym.baselines.workflow.online.registry import online_rule
from servegym.cli import main
from servegym.errors import ConfigError
from servegym.evaluate.harness import evaluate
from servegym.evaluate.table import comparison_table
from servegym.evaluate.tune import tune
from servegym.problems.job_metrics import alone_s, measure_jobs
from servegym.problems.workflow import Workflow
from servegym.workflow.job import JobBuilder
from servegym.workflow.online.run import run
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.spec import DeviceType, Episode, FleetSpec
from servegym.workflow_scenario import WorkflowScenario

TINY = {
    "kind": "workflow",
    "name": "tiny",
    "devices": [{"name": "a", "count": 2}, {"name": "b"}],
    "workload": {"kind": "random-dag", "device_types": ["a", "b"], "num_tasks": 10},
    "rate_jobs_per_s": 0.25,
    "num_jobs": 12,
}


def scenario(**changes):
    return WorkflowScenario.model_validate({**TINY, **changes})


def test_metrics_are_what_one_computes_by_hand():
    builder = JobBuilder("toy", ("a", "b"))
    first = builder.task(0, {"a": 2.0, "b": 1.0})
    builder.edge(first, builder.task(1, {"a": 2.0, "b": 4.0}))
    jobs = [builder.build(deadline_s=5.0, weight=3.0), builder.build(deadline_s=6.0)]
    spec = FleetSpec((DeviceType("a"), DeviceType("b")))
    episodes = [Episode.of(jobs, [0], [0.0, 1.0])]
    simulator = Simulator(spec, episodes)
    run(simulator, online_rule("fifo"))
    # on one device of type a: 0 to 4 s and 4 to 8 s
    got = measure_jobs(simulator, 0, alone_s(spec, episodes)[0])
    want = {
        "jct_mean_s": (4 + 7) / 2,
        "jct_p50_s": 5.5,
        "weighted_jct_mean_s": (3 * 4 + 7) / 4,
        "slowdown_mean": (4 / 4 + 7 / 4) / 2,
        "makespan_s": 8.0,
        "throughput_jobs_per_s": 2 / 8,
        "deadline_attainment": 3 / 4,
        "tardiness_mean_s": 0.5,
        "utilisation": 1.0,
        "utilisation_a": 1.0,
        "wait_mean_s": 3 / 4,
        "in_system_mean": 11 / 8,
        "restarts": 0.0,
        "decisions": 4.0,
    }
    assert {key: got[key] for key in want} == pytest.approx(want)
    assert np.isnan(got["prefix_hit_rate"])
    assert "utilisation_b" not in got


def test_all_policies_play_the_same_jobs_and_the_best_is_first():
    policies = [online_rule(name) for name in ("random", "heft-rt", "mct", "mct-oracle")]
    result = evaluate(scenario(), policies, loads=[0.5, 1.0], num_seeds=4)
    assert len(result.runs) == 4 * 2 * 4
    for load in (0.5, 1.0):
        means = [result.mean(name, load, "jct_mean_s") for name, _ in result.ranking(load)]
        assert means == sorted(means)
        assert result.ratio(result.best_heuristic(load), result.best_heuristic(load), load)[:3] == (
            1.0,
            1.0,
            1.0,
        )
        assert result.ratio("random", "mct", load).low > 1.0
    # nothing is noisy: the truth is no news
    np.testing.assert_array_equal(
        result.values("mct", 1.0, "jct_mean_s"), result.values("mct-oracle", 1.0, "jct_mean_s")
    )
    assert comparison_table(result, 1.0).row_count == 4


def test_attainment_is_better_the_more():
    strict = scenario(
        objective="deadline",
        workload={"kind": "map-reduce"},
        devices=[],
        engines=[{"gpu": "L40S", "count": 2}],
        model="Llama-3.1-8B",
        deadline_scale=1.0,
        rate_jobs_per_s=1.0,
    )
    result = evaluate(
        strict, [online_rule(name) for name in ("round-robin", "least-slack")], num_seeds=2
    )
    shares = [result.mean(name, 1.0, "deadline_attainment") for name, _ in result.ranking(1.0)]
    assert shares == sorted(shares, reverse=True)


def test_replay_finds_a_value_no_worse_than_the_ends_of_the_range():
    base = scenario(rate_jobs_per_s=0.6)
    found = tune(Workflow(), base, "weighted-fair", (1.0,), budget=12, num_seeds=2).text
    names = [found, *(f"weighted-fair:alpha={a}" for a in (-2, 2))]
    result = evaluate(
        base, [online_rule(n) for n in dict.fromkeys(names)], num_seeds=2, first_seed=0
    )
    assert result.ranking(1.0)[0][0] == found


def test_nothing_to_compare_is_refused():
    with pytest.raises(ConfigError, match="there must be at least one policy"):
        evaluate(scenario(), [])
    with pytest.raises(ConfigError, match="every policy needs its own name"):
        evaluate(scenario(), [online_rule("fifo"), online_rule("fifo")])
    with pytest.raises(ConfigError, match="loads must be given"):
        evaluate(scenario(), [online_rule("fifo")], loads=[])


def test_command_compares_and_writes(tmp_path, capsys):
    path, out = tmp_path / "tiny.yaml", tmp_path / "out.json"
    path.write_text(yaml.safe_dump(TINY))
    names = ["fifo", "hexgen:tuned", "heft-replan"]
    options = ["--loads", "1.0", "--seeds", "2", "--json", str(out)]
    main(["evaluate", "--scenario", str(path), "--policies", *names, *options])
    printed = capsys.readouterr().out
    assert "mean JCT over that of" in printed
    assert "hexgen:alpha=" in printed
    document = json.loads(out.read_text())
    assert document["schema"] == "servegym-evaluation-1"
    assert document["scenario"]["kind"] == "workflow"
    assert {row["ratio"]["metric"] for row in document["aggregates"]} == {"jct_mean_s"}
    assert len(document["runs"]) == 3 * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trace", "x.csv"], "--trace is for scenarios of requests"),
        (["--policies", "fifo:tuned"], "unknown tunable policy 'fifo'"),
        (["--policies", "least-outstanding"], "unknown policy"),
    ],
)
def test_command_refuses_what_is_not_for_jobs(options, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "--scenario", "random-dags", *options])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
