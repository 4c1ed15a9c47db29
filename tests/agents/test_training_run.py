"""What all trainers have in common: names in TensorBoard, options, folders of older formats."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from servegym.agents.network_config import NetworkConfig
from servegym.cli import _parse, main
from servegym.errors import ConfigError, ExportError
from servegym.export.manifest import Manifest, read_manifest
from servegym.export.resolve import load_policy
from servegym.problems.registry import PROBLEMS
from servegym.train.ppo_settings import PPOConfig
from servegym.train.registry import TRAINERS
from servegym.train.run_folder import RunFolder, StoredRun, digest
from servegym.train.validation import Validated

ORDER = {
    "name": "tight",
    "engine": {"block_size": 16, "max_num_seqs": 8, "prefix_caching": False},
    "fleet": [{"gpu": "L4", "num_blocks": 120, "engine": "vllm-priority"}],
    "workload": {
        "kind": "generated",
        "rate_rps": 1.5,
        "prompt": {"medians_tokens": [200.0], "sigmas": [1.0], "max_tokens": 800},
        "output": {"medians_tokens": [150.0], "max_tokens": 600},
    },
    "num_requests": 40,
}
JOBS = {
    "kind": "workflow",
    "name": "small",
    "devices": [{"name": "a"}, {"name": "b", "count": 2}],
    "workload": {"kind": "random-dag", "device_types": ["a", "b"], "num_tasks": 6},
    "rate_jobs_per_s": 0.3,
    "num_jobs": 8,
}
SHORT = {
    "dispatch": {
        "total_decisions": 128,
        "num_envs": 4,
        "num_steps": 16,
        "num_requests": 12,
        "validate_every": 1,
    },
    "order": {
        "max_minutes": math.inf,
        "max_generations": 5,
        "num_hidden": 2,
        "num_candidates": 8,
        "num_episodes": 2,
        "num_validation": 3,
    },
    "workflow": {
        "max_minutes": math.inf,
        "max_generations": 2,
        "max_updates": 2,
        "num_jobs": (3, 5),
        "pool_size": 10,
        "groups": 1,
        "group_size": 2,
        "validate_every": 1,
        "validation_episodes": 2,
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, write_scenario) -> dict[str, Path]:
    """Folders of short finished runs, exported, by problem."""
    place = tmp_path_factory.mktemp("runs")
    (place / "order.yaml").write_text(yaml.safe_dump(ORDER))
    (place / "jobs.yaml").write_text(yaml.safe_dump(JOBS))
    scenarios = {
        "dispatch": write_scenario(),
        "order": str(place / "order.yaml"),
        "workflow": str(place / "jobs.yaml"),
    }
    for problem, entry in TRAINERS.items():
        config = entry.settings(scenario=scenarios[problem], **SHORT[problem])
        trainer = entry.trainer(config, place / problem)
        trainer.run()
        trainer.export()
    return {problem: place / problem for problem in TRAINERS}


def policy_file(run: Path) -> Path:
    return next(x for x in (run / "policy" / "policy.onnx", run / "ordering.npz") if x.exists())


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


@pytest.mark.parametrize("problem", TRAINERS)
def test_tensorboard_has_the_same_names_for_all(runs, problem):
    log = EventAccumulator(str(runs[problem] / "tensorboard"))
    log.Reload()
    names = set(log.Tags()["scalars"])
    assert {
        "rollout/return",
        "validation/objective",
        "validation/p99_s",
        "validation/gain",
        "validation/best_gain",
        "time/fps",
    } <= names
    learns = {"dispatch": {"train/policy_loss"}, "order": {"train/spread"}}
    assert learns.get(problem, {"train/policy_loss", "train/spread"}) <= names
    rules = TRAINERS[problem].trainer.references
    assert {f"reference/{rule}" for rule in rules} <= names
    assert set(rules) <= set(PROBLEMS[problem].rules)
    for rule in rules:  # a line: the same at every validation
        values = {event.value for event in log.Scalars(f"reference/{rule}")}
        assert len(values) == 1
    steps = [event.step for event in log.Scalars("validation/objective")]
    assert steps == sorted(set(steps))


def test_validation_is_summed_up_in_the_unit_of_the_objective():
    latencies_s = [torch.tensor([1.0, 3.0]).numpy(), torch.tensor([8.0]).numpy()]
    found = Validated.of(torch.tensor([2.0, 8.0]).log().numpy(), latencies_s, in_time=False)
    assert found.objective == pytest.approx(5.0)  # mean of the means 2 and 8
    assert found.p99_s == pytest.approx(3.0 + 0.98 * 5.0)  # between the second and the third of 3
    shares = Validated.of(torch.tensor([-0.5, -1.0]).numpy(), latencies_s, in_time=True)
    assert shares.objective == 0.75


def test_a_network_begins_with_the_parameters_of_its_own_rule():
    for words in (["--base", "prefix-load"], ["--base=prefix-load"]):
        assert _parse(["train", *words]).settings.network == NetworkConfig(base="prefix-load")
    assert _parse(["train"]).settings == PPOConfig()
    inferred = ["train", "--extended", "--base", "added-delay-inferred:prefill=2"]
    assert _parse(inferred).settings.network.base == "added-delay-inferred"
    with pytest.raises(ConfigError, match="give --extended"):
        _parse(["train", "--base", "added-delay-inferred"])
    given = _parse(["train", "--base", "speed-family:eta=0.5", "--hidden", "8"]).settings.network
    assert given == NetworkConfig(base="speed-family", base_params=(0.5,), hidden=8)


@pytest.mark.parametrize("problem", TRAINERS)
def test_every_setting_of_a_trainer_is_an_option(runs, problem, capsys):
    scenario = StoredRun.read(runs[problem]).settings["scenario"]
    with pytest.raises(SystemExit) as end:
        main(["train", "--scenario", scenario, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    renamed = {"total_decisions": "decisions", "max_minutes": "minutes"}
    fields = {f.name for f in dataclasses.fields(TRAINERS[problem].settings)} - {"network"}
    for name in fields:
        assert f"--{renamed.get(name, name).replace('_', '-')} " in shown.replace(",", " ")
    assert ("--base " in shown) == (problem != "order")


def test_options_reach_the_settings():
    words = ["--scenario", "text-to-sql", "--groups", "7", "--base", "edd", "--minutes=3"]
    settings = _parse(["train", *words]).settings
    assert isinstance(settings, TRAINERS["workflow"].settings)
    assert (settings.groups, settings.network.base, settings.max_minutes) == (7, "edd", 3.0)
    settings = _parse(["train", "--base", "speed-family:eta=2", "--num-steps", "9"]).settings
    assert (settings.network.base, settings.network.base_params) == ("speed-family", (2.0,))
    assert settings.num_steps == 9


@pytest.mark.parametrize("problem", TRAINERS)
def test_a_policy_is_loaded_whatever_its_problem_and_refused_where_another_is_asked_for(
    runs, problem
):
    path = policy_file(runs[problem])
    assert read_manifest(path).problem == problem
    assert load_policy(path).name == problem
    other = next(name for name in TRAINERS if name != problem)
    said = f"is a policy of problem {problem}, and this is problem {other}: choose another"
    with pytest.raises(ExportError, match=said):
        load_policy(path, other)


def older_manifest(problem: str, manifest: dict) -> dict:
    """Return a manifest as it was before it named its problem."""
    old = {
        key: manifest[key]
        for key in ("schema_version", "information", "sha256", "servegym_version", "training")
    }
    features, ranges = manifest["features"], manifest["ranges"]
    if problem == "order":
        return {**old, "kind": "ordering", "features": features["requests"], "ranges": []}
    old |= {"weights_sha256": manifest["weights_sha256"], "scenario": manifest["scenario"]}
    if problem == "dispatch":
        return {
            **old,
            "replica_features": features["replicas"],
            "request_features": features["request"],
            "replica_ranges": ranges["replicas"],
            "request_ranges": ranges["request"],
            "num_extra_actions": manifest["num_extra_actions"],
            "network": manifest["network"],
        }
    del old["schema_version"]
    return {
        **old,
        **manifest["network"],
        "kind": "workflow",
        "pair_features": features["pairs"],
        "stage_features": features["stages"],
        "pair_ranges": ranges["pairs"],
        "objective": manifest["objective"],
    }


@pytest.mark.parametrize("problem", TRAINERS)
def test_policies_exported_before_manifests_named_their_problem_load(runs, problem, tmp_path):
    path = policy_file(copied(runs[problem], tmp_path / "older"))
    beside = path.parent / "manifest.json"
    today = json.loads(beside.read_text())
    beside.write_text(json.dumps(older_manifest(problem, today)))
    assert load_policy(path, problem).name == "older"
    read, want = read_manifest(path), Manifest.model_validate(today)
    assert (read.problem, read.features, read.network) == (problem, want.features, want.network)
    if problem != "order":
        assert read.ranges == want.ranges


def as_format_2(run: Path, problem: str) -> None:
    """Rewrite a run's folder as version 2 of the format had it."""
    described = json.loads((run / "config.json").read_text())
    kinds = {"dispatch": "dispatcher", "order": "order", "workflow": "scheduler"}
    del described["problem"]
    described |= {"format": 2, "kind": kinds[problem]}
    (run / "config.json").write_text(json.dumps(described))
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    updates, stage = content.pop("updates"), content.pop("stage")
    best, first = content["best_scores"].mean().item(), content.pop("first_scores").mean().item()
    del content["lines"]
    content["format"] = 2
    if problem == "dispatch":
        content["update"] = updates[0]
        del content["episode_returns"]
    elif problem == "order":
        del content["best_scores"], content["last"]
        content |= {"generation": sum(updates), "stage": min(stage, 1), "losses": [best, first]}
    else:
        del content["last"]
        content |= {"update": updates[1], "searched": stage >= 1}
    torch.save(content, run / "checkpoint.pt")


@pytest.mark.parametrize("problem", TRAINERS)
def test_a_folder_of_the_format_before_exports_the_same_policy(runs, problem, tmp_path):
    run = copied(runs[problem], tmp_path / "older")
    as_format_2(run, problem)
    main(["export", "--run-folder", str(run), "--out", str(tmp_path / "exported")])
    path = policy_file(run)
    written = tmp_path / "exported" / path.name
    assert written.read_bytes() == path.read_bytes()
    now, before = (read_manifest(x).training for x in (written, path))
    assert now.keys() == before.keys()
    for key, value in before.items():
        assert now[key] == (pytest.approx(value, abs=1e-4) if "loss" in key else value)
    # and the run itself is known to be finished
    stored = StoredRun.read(run)
    assert RunFolder.stored(stored).begin()["finished"]


@pytest.mark.parametrize("problem", TRAINERS)
def test_a_run_exports_though_its_scenario_has_changed_since(runs, problem, tmp_path):
    run = copied(runs[problem], tmp_path / "run")
    described = json.loads((run / "config.json").read_text())
    described["settings"]["scenario"] = "gone.yaml"
    described["versions"]["numpy"] = "1.0"
    # a checkpoint belongs to its configuration: give it the changed one's digest
    (run / "config.json").write_text(json.dumps(described))
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    content["configuration"] = digest(StoredRun.read(run).configuration)
    torch.save(content, run / "checkpoint.pt")
    main(["export", "--run-folder", str(run), "--out", str(tmp_path / "exported")])
    path = policy_file(runs[problem])
    assert (tmp_path / "exported" / path.name).read_bytes() == path.read_bytes()
