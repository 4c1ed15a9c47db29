"""Dispatcher and schedulers learned together: what is searched is what is exported and played."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from json import loads

import numpy as np
import pytest
import torch
import yaml

from servegym.agents.features import replica_inputs
from servegym.cli import _parse, main
from servegym.errors import ConfigError, ExportError
from servegym.export.resolve import resolve_dispatch, resolve_policy
from servegym.policy.contract import observed
from servegym.policy.learned_ordering import MlpOrdering
from servegym.policy.pair import Pair
from servegym.policy.replica_inputs import (
    NUM_EXTENDED_INPUTS,
    NUM_HELD_INPUTS,
    NUM_INPUTS,
    write_inferred_inputs,
    write_inputs,
    write_router_inputs,
)
from servegym.policy.run_pair import make_simulator, run_pair
from servegym.scenario import load_scenario
from servegym.serve.vllm.plugin import load_policy
from servegym.train.joint import JointTrainer
from servegym.train.joint_settings import JointTraining
from servegym.train.pair_run import DISPATCHER, SCHEDULERS
from servegym.train.registry import find_trainer
from servegym.train.request_run import losses
from servegym.train.search import Search

FLEET = {
    "name": "tight fleet",
    "engine": {"block_size": 16, "max_num_seqs": 8, "prefix_caching": False},
    "fleet": [
        {"gpu": "L4", "num_blocks": 120, "engine": "vllm-priority", "count": 2},
        {"gpu": "L40S", "num_blocks": 150, "engine": "vllm-priority"},
    ],
    "workload": {
        "kind": "generated",
        "rate_rps": 5.0,
        "prompt": {"medians_tokens": [200.0], "sigmas": [1.0], "max_tokens": 800},
        "output": {"medians_tokens": [150.0], "max_tokens": 600},
    },
    "disturbances": {"predictor": {"kind": "lognormal", "sigma": 0.5}},
    "num_requests": 90,
}


@pytest.fixture
def fleet(tmp_path):
    path = tmp_path / "fleet.yaml"
    path.write_text(yaml.safe_dump(FLEET))
    return str(path)


def settings(scenario, **changes):
    small = JointTraining(
        scenario=scenario,
        load=(0.8, 1.2),
        max_minutes=math.inf,
        max_generations=8,
        num_hidden=2,
        num_candidates=6,
        num_episodes=2,
        num_requests=60,
        num_validation=4,
    )
    return replace(small, **changes)


def played(scenario, pair, episodes):
    simulator = make_simulator(scenario.spec, episodes, pair)
    run_pair(simulator, pair)
    return simulator


def same_fate(got, want, envs) -> None:
    for env in range(envs):
        a, b = got.outcomes(env), want.outcomes(env)
        np.testing.assert_array_equal(a["replica"], b["replica"])
        np.testing.assert_allclose(a["finish_s"], b["finish_s"], rtol=1e-12)


@pytest.mark.parametrize(
    ("extended", "holds", "inputs"), [(False, False, 25), (True, False, 38), (True, True, 42)]
)
def test_compiled_inputs_are_those_of_the_network(extended, holds, inputs):
    rng, shape = np.random.default_rng(3), observed(extended=extended)
    replicas = rng.lognormal(0.0, 3.0, (shape.replicas, 5))
    replicas[:, 4] = 0.0  # nothing there
    request = rng.lognormal(2.0, 2.0, shape.request)
    rows = torch.from_numpy(replicas.T.copy()), torch.from_numpy(request)
    want = replica_inputs(*rows, extended=extended, holds=holds).numpy()
    numbers = NUM_INPUTS, NUM_EXTENDED_INPUTS, NUM_HELD_INPUTS
    assert want.shape == (5, numbers[extended + holds]) == (5, inputs)
    for r in range(5):
        out = np.full(inputs, np.nan)
        write_inputs(replicas, request, r, out)
        if extended:
            write_inferred_inputs(replicas, request, r, out)
        if holds:
            write_router_inputs(replicas, request, out)
        np.testing.assert_allclose(out, want[r], rtol=1e-9, atol=1e-9)


def test_search_begins_as_added_delay(fleet, tmp_path):
    trainer = JointTrainer(settings(fleet), tmp_path / "run")
    guesses = [search.mean[None] for search in trainer.searches]
    learned = trainer._play(guesses, trainer._validation)
    order = trainer.order_space.weights(trainer.searches[SCHEDULERS].mean)
    order = MlpOrdering(order, information="predictive", name="order")
    rule = Pair(resolve_policy("added-delay"), order, "rule")
    same_fate(learned, played(trainer.scenario, rule, trainer._validation), 4)


@pytest.mark.parametrize(
    "start",
    [
        "min-kv+footprint:weight=3.293,victim_weight=-1.81",
        "least-outstanding+fcfs",
        "added-delay:prefill=0.3,decode=2+srpt",
    ],
)
def test_search_begins_at_the_start_request_by_request_and_exports_it_so(fleet, tmp_path, start):
    trainer = JointTrainer(settings(fleet, start=start), tmp_path / "run")
    trainer.open_stage()
    learned = trainer._play([search.mean[None] for search in trainer.searches], trainer._validation)
    want = played(trainer.scenario, resolve_dispatch(start), trainer._validation)
    same_fate(learned, want, 4)
    trainer.best = trainer.parameters()
    trainer.best_scores = trainer.first_scores = trainer.validate().scores
    trainer.export(tmp_path / "kept")
    kept = resolve_dispatch(str(tmp_path / "kept"))
    same_fate(played(trainer.scenario, kept, trainer._validation), want, 4)
    # requests were preempted, and replicas differ: both decisions mattered
    assert want.state.request["num_preemptions"].sum() > 20
    assert set(want.outcomes(0)["replica"]) == {0, 1, 2}


def test_with_a_start_what_is_found_is_what_both_parts_play(fleet, tmp_path):
    start = "min-kv+footprint:weight=2,victim_weight=-1"
    trainer = JointTrainer(settings(fleet, start=start), tmp_path / "run")
    found = trainer.run()
    assert found.loss <= found.first_loss
    rng = np.random.default_rng(0)
    trainer.best = [x + 0.3 * torch.from_numpy(rng.normal(size=len(x))) for x in trainer.best]
    trainer.export(tmp_path / "moved")
    want = trainer._play([x.numpy()[None] for x in trainer.best], trainer._validation)
    pair = resolve_dispatch(str(tmp_path / "moved"))
    same_fate(played(trainer.scenario, pair, trainer._validation), want, 4)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("min-kv", "start must be DISPATCH.ORDER of rules that the search contains, DISPATCH one"),
        ("added-delay-inferred+srpt", "least-outstanding, min-kv, ORDER one of fcfs, footprint, s"),
        ("min-kv+edf", "got 'min-kv.edf'"),
        ("min-kv+srpt-oracle", "got 'min-kv.srpt-oracle'"),
        ("min-kv+footprint:power=2", "power"),
        ("min-kv:power=2+footprint", "power"),
    ],
)
def test_a_start_that_is_not_contained_is_refused_in_one_sentence(fleet, tmp_path, start, message):
    with pytest.raises(ConfigError, match=message) as refused:
        JointTrainer(settings(fleet, start=start), tmp_path)
    assert "\n" not in str(refused.value)


def test_min_kv_is_no_start_where_engines_have_different_slots(tmp_path):
    path, entries = tmp_path / "slots.yaml", [dict(entry) for entry in FLEET["fleet"]]
    entries[1]["max_num_seqs"] = 4
    path.write_text(yaml.safe_dump({**FLEET, "fleet": entries}))
    with pytest.raises(ConfigError, match=r"of the same max_num_seqs: .* got 4, 8"):
        JointTrainer(settings(str(path), start="min-kv+srpt"), tmp_path / "run")


def test_what_is_found_is_what_both_parts_of_the_folder_play(fleet, tmp_path):
    config = settings(fleet)
    trainer = JointTrainer(config, tmp_path / "run")
    found = trainer.run()
    assert trainer.generation == 8
    assert found.loss < found.first_loss
    assert trainer.export() == tmp_path / "run"
    # with hidden units that do something
    rng = np.random.default_rng(0)
    trainer.best = [x + 0.3 * torch.from_numpy(rng.normal(size=len(x))) for x in trainer.best]
    trainer.export(tmp_path / "moved")
    wanted = [x.numpy()[None] for x in trainer.best]
    want = trainer._play(wanted, trainer._validation)
    pair = resolve_dispatch(str(tmp_path / "moved"))
    assert isinstance(pair, Pair)
    assert pair.name == "moved"
    got = played(trainer.scenario, pair, trainer._validation)
    same_fate(got, want, 4)
    assert set(got.outcomes(0)["replica"]) == {0, 1, 2}
    # the kept one plays as validation said, and each part by itself is whom it is for
    kept = played(trainer.scenario, resolve_dispatch(str(tmp_path / "run")), trainer._validation)
    scores = losses(trainer.scenario, kept)
    assert scores.mean() == pytest.approx(found.loss, rel=1e-6)
    assert resolve_policy(str(tmp_path / "run" / "policy" / "policy.onnx")).name == "run"
    assert isinstance(load_policy(str(tmp_path / "run" / "ordering.npz")), MlpOrdering)


class Killed(Exception):
    pass


def test_killed_search_ends_as_an_uninterrupted_one(fleet, tmp_path, monkeypatch):
    config = settings(fleet)
    whole = JointTrainer(config, tmp_path / "whole")
    whole.run()
    real, made = Search.update, []

    def update(self, *arguments):
        made.append(self)
        if len(made) > 5:
            raise Killed
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Search, "update", update)
        with pytest.raises(Killed):
            JointTrainer(config, tmp_path / "parts").run()
    again = JointTrainer(config, tmp_path / "parts")
    again.run()
    assert again.generation == whole.generation == 8
    for part in (SCHEDULERS, DISPATCHER):
        np.testing.assert_array_equal(again.best[part].numpy(), whole.best[part].numpy())
        assert whole.searches[part].generation > 0
    np.testing.assert_array_equal(again.best_scores, whole.best_scores)


def test_command_trains_exports_and_plays_both(fleet, tmp_path, capsys):
    out, short = tmp_path / "learned", ["--num-hidden", "0", "--num-validation", "2"]
    words = ["train", "--scenario", fleet, "--max-generations", "2", "--num-requests", "60"]
    main([*words, "--num-candidates", "4", *short, "--out", str(out)])
    assert "which no budget counts" in capsys.readouterr().out
    before = [(out / x).read_bytes() for x in ("ordering.npz", "policy/weights.npz")]
    main(["export", "--run-folder", str(out)])
    assert before == [(out / x).read_bytes() for x in ("ordering.npz", "policy/weights.npz")]
    json = tmp_path / "numbers.json"
    main(["evaluate", "--scenario", fleet, "--loads", "1", "--seeds", "2", "--json", str(json),
          "--policies", "added-delay+footprint", str(out)])  # fmt: skip
    assert "learned" in capsys.readouterr().out
    found = {(x["policy"], x["information"]) for x in loads(json.read_text())["aggregates"]}
    assert found == {("added-delay+footprint", "predictive"), ("learned", "predictive")}


def test_fleets_that_take_orders_are_trained_so_unless_a_learner_is_named():
    words = ["--scenario", "kv-starved-fleet"]
    command = _parse(["train", *words, "--num-candidates", "9", "--minutes", "3"])
    assert isinstance(command.settings, JointTraining)
    assert (command.settings.num_candidates, command.settings.max_minutes) == (9, 3.0)
    assert not isinstance(_parse(["train", *words, "--learner", "ppo"]).settings, JointTraining)
    assert find_trainer("dispatch", None, load_scenario("mixed-chat")).folder == "ppo"
    assert find_trainer("dispatch", None, load_scenario("slo-tiers-fleet")).folder == "joint"


def test_every_setting_is_an_option(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--scenario", "kv-starved-fleet", "--help"])
    shown = capsys.readouterr().out.replace(",", " ")
    fields = {f.name for f in dataclasses.fields(JointTraining)} - {"learner"}
    assert len(fields) > 8
    for name in fields:
        assert f"--{'minutes' if name == 'max_minutes' else name.replace('_', '-')} " in shown


def test_what_cannot_be_trained_or_played_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="mixed-chat must have two replicas or more, all with"):
        JointTrainer(JointTraining(scenario="mixed-chat"), tmp_path)
    with pytest.raises(ConfigError, match="num_candidates must be at least 1, got 0"):
        JointTraining(num_candidates=0)
    with pytest.raises(ExportError, match=r"policy.onnx must exist with a manifest.json beside it"):
        resolve_dispatch(str(tmp_path))
