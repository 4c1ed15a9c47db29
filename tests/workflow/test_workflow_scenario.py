"""Scenarios of jobs: the bundled ones play, wrong ones are refused in one sentence."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

from servegym.errors import ConfigError
from servegym.scenario import scenario_names
from servegym.scenario.files import parse
from servegym.workflow.online.simulator import Simulator
from servegym.workflow_scenario import (
    WorkflowScenario,
    is_workflow_scenario,
    load_workflow_scenario,
    workflow_scenario_names,
)

BASE = {
    "kind": "workflow",
    "name": "tiny",
    "devices": [{"name": "a", "count": 2}, {"name": "c"}],
    "workload": {"kind": "random-dag", "device_types": ["a", "b", "c"], "num_tasks": 6},
    "rate_jobs_per_s": 2.0,
    "num_jobs": 200,
}


def scenario(*without: str, **changes):
    data = {key: value for key, value in {**BASE, **changes}.items() if key not in without}
    return parse(yaml.safe_dump(data), "tiny.yaml", WorkflowScenario)


@pytest.mark.parametrize("name", workflow_scenario_names())
def test_bundled_scenario_gives_a_valid_episode(name):
    bundled = load_workflow_scenario(name)
    assert bundled.name == name
    assert bundled.description
    episode = bundled.episode(0)
    Simulator(bundled.spec, [episode])
    assert episode.num_jobs == bundled.num_jobs
    assert episode.num_devices <= bundled.max_devices


def test_types_are_the_columns_of_the_workload_then_the_engines():
    mixed = scenario(
        model="Llama-3.1-8B", engines=[{"gpu": "L40S", "count": 1}], engine={"max_num_seqs": 7}
    )
    assert [t.name for t in mixed.spec.types] == ["a", "b", "c", "L40S x1"]
    assert mixed.spec.types[3].num_slots == 7
    assert mixed.episode(0).type_idx.tolist() == [0, 0, 2, 3]


def test_seed_decides_everything_and_load_only_the_rate():
    base = scenario(disturbances={"fail_stop": {"rate_per_replica_hour": 60.0}})
    first, again, faster = base.episode(4), base.episode(4), base.episode(4, load=2.0)
    other = base.episode(5)
    np.testing.assert_array_equal(first.arrival_s, again.arrival_s)
    np.testing.assert_allclose(faster.arrival_s, first.arrival_s / 2)
    assert first.noise_seed == again.noise_seed != other.noise_seed
    for a, b in zip(first.jobs, faster.jobs, strict=True):
        np.testing.assert_array_equal(a.duration_s, b.duration_s)
    assert len(first.faults) > 0
    assert 1.0 / np.diff(first.arrival_s).mean() == pytest.approx(2.0, rel=0.2)


def test_pool_gives_jobs_with_replacement():
    base = scenario()
    pool = base.draw_jobs(0, 5)
    episode = base.episode(1, pool=pool)
    assert episode.jobs is pool
    assert set(episode.order.tolist()) == set(range(5))


def test_jobs_arrive_together_without_a_rate():
    assert not scenario("rate_jobs_per_s").episode(0).arrival_s.any()


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"name: \xff\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml is not UTF-8 text"):
        load_workflow_scenario(path)


def test_kind_says_which_file_is_which(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump(BASE))
    assert is_workflow_scenario(str(mine))
    assert load_workflow_scenario(mine).name == "tiny"
    other = tmp_path / "other.yaml"
    other.write_text("name: x\n")
    assert not is_workflow_scenario(str(other))
    assert not any(is_workflow_scenario(name) for name in scenario_names())
    assert not set(workflow_scenario_names()) & set(scenario_names())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": []}, "engines and devices are both missing"),
        ({"devices": [{"name": "a"}, {"name": "a"}]}, "devices must have different names"),
        ({"devices": [{"name": "z"}]}, r"among the workload's device_types \(a, b, c\)"),
        ({"devices": [{"name": "c"}, {"name": "a"}]}, "in that order, got c, a"),
        ({"devices": [{"name": "a", "count": [3, 1]}]}, "a range must go from low to high"),
        ({"rate_jobs_s": 1.0}, "unknown key rate_jobs_s; did you mean rate_jobs_per_s"),
        ({"rate_jobs_per_s": 0.0}, "rate_jobs_per_s: input should be greater than 0"),
        ({"workload": {"kind": "random-dags"}}, "unknown kind 'random-dags'"),
        ({"objective": "latency"}, "objective"),
        (
            {"engine": {"retain_kv_s": 5.0}},
            "retain_kv_s is 5.0, but engines of jobs .* leave it out",
        ),
    ],
)
def test_wrong_value_is_refused_in_one_sentence(changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        scenario(**changes)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("tiny.yaml: ")


@pytest.mark.parametrize("settings", [{"load": 0.0}, {"load": float("inf")}, {"num_jobs": 0}])
def test_impossible_episode_is_refused(settings):
    with pytest.raises(ConfigError, match="must be"):
        scenario().episode(0, **settings)


def test_unknown_name_is_refused():
    with pytest.raises(ConfigError, match="did you mean text-to-sql"):
        load_workflow_scenario("text-to-sq")
    with pytest.raises(ConfigError, match="no scenario file at"):
        load_workflow_scenario("missing.yaml")
