"""Learning both decisions of a fleet in which requests are placed: scores, search and files."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import yaml

from servegym.cli import main
from servegym.errors import ConfigError, ExportError
from servegym.export.manifest import NAME
from servegym.export.placed import save_placed
from servegym.export.resolve import resolve_dispatch
from servegym.policy.contract import REPLICA_FEATURES, REQUEST_FEATURES
from servegym.policy.placed_scores import NUM_TERMS, TERMS, PlacedWeights, placed_policy
from servegym.policy.policy import Observations
from servegym.problems.dispatch import Dispatch, DispatchEpisodes
from servegym.train.placed import PlacedTrainer
from servegym.train.placed_settings import PlacedTraining
from servegym.train.search import Search

LINK = {"gb_per_s": 10.0}
SPLIT = {
    "name": "split",
    "engine": {"block_size": 16, "max_num_seqs": 16},
    "fleet": [
        {"gpu": "L4", "count": 2, "num_blocks": 300, "role": "prefill", "link": LINK},
        {"gpu": "L4", "count": 2, "num_blocks": 300, "role": "decode", "link": LINK},
        {"gpu": "L4", "count": 1, "num_blocks": 300, "link": LINK},
    ],
    "workload": {
        "kind": "generated",
        "rate_rps": 6.0,
        "prompt": {"medians_tokens": [200.0], "max_tokens": 800},
        "output": {"medians_tokens": [50.0], "max_tokens": 200},
    },
    "slo_classes": [{"name": "all", "ttft_s": 1.0, "tpot_s": 0.07}],
    "actions": {"reject": True},
    "objective": "goodput",
}


@pytest.fixture
def split(tmp_path):
    path = tmp_path / "split.yaml"
    path.write_text(yaml.safe_dump(SPLIT))
    return str(path)


def settings(scenario, **changes):
    small = PlacedTraining(
        scenario=scenario,
        load=(2.0, 5.0),
        max_minutes=math.inf,
        max_generations=6,
        num_candidates=8,
        num_episodes=2,
        num_validation=4,
        num_requests=80,
    )
    return replace(small, **changes)


def seen(**rows) -> Observations:
    """Three replicas with steps of 10 ms; a request of 100 tokens with limits of 1 s and 20 ms."""
    replicas = np.zeros((1, len(REPLICA_FEATURES), 3))
    known = {
        "up": 1.0,
        "decodes": 1.0,
        "prefill_tokens_per_s": 1000.0,
        "decode_step_s": 0.01,
        "decode_seq_s": 0.001,
        "step_time_ratio": 1.0,
        "kv_tokens_per_s": 1000.0,
    }
    names = [f.name for f in REPLICA_FEATURES]
    for name, values in {**known, **rows}.items():
        replicas[0, names.index(name)] = values
    request = np.zeros((1, len(REQUEST_FEATURES)))
    for i, feature in enumerate(REQUEST_FEATURES):
        known = {"prompt_tokens": 100.0, "ttft_slo_s": 1.0, "tpot_slo_s": 0.02}
        request[0, i] = known.get(feature.name, 0.0)
    return Observations(replicas, request, np.array([[True, True, True, False, True]]))


@pytest.mark.parametrize(
    ("term", "rows", "choice"),
    [
        ("prefill_only", {"decodes": (0, 1, 1)}, 1),
        ("log_ttft", {"pending_prefill_tokens": (20, 10, 30)}, 1),
        ("log_ttft", {"pending_prefill_tokens": (20, 10, 30), "prefix_hit_tokens": (0, 0, 90)}, 2),
        # what only prefills moves its KV: 0.1 s, and its link is busy
        ("log_ttft", {"decodes": (0, 0, 1), "pending_prefill_tokens": (0, 0, 99)}, 2),
        ("log_ttft", {"decodes": 0, "link_busy_s": (0.2, 0.1, 0.3)}, 1),
        ("late", {"pending_prefill_tokens": (2000, 0, 0)}, 1),
        ("log_tpot", {"outstanding_requests": (5, 4, 3)}, 2),
        # one that only prefills is as good as the best that decodes
        ("log_tpot", {"outstanding_requests": (50, 4, 3), "decodes": (0, 1, 1)}, 0),
        ("slow", {"outstanding_requests": (30, 0, 1)}, 1),
        ("delays", {"outstanding_requests": (3, 3, 3), "prefix_hit_tokens": (0, 50, 0)}, 1),
        ("kv_usage", {"kv_cache_usage": (0.5, 0.4, 0.3)}, 2),
        ("holding", {"num_holding": (1, 0, 2)}, 1),
        ("link_busy", {"link_busy_s": (1, 2, 0.5)}, 2),
        ("arriving", {"arriving_tokens": (10, 0, 20)}, 1),
        ("cached", {"prefix_hit_tokens": (10, 30, 20)}, 1),
    ],
)
def test_a_term_alone_decides_by_what_it_is_about(term, rows, choice):
    weights = np.zeros(NUM_TERMS + 1)
    weights[TERMS.index(term)], weights[NUM_TERMS] = 1.0, math.inf
    policy = placed_policy(PlacedWeights(weights, weights[:NUM_TERMS]), "one")
    policy.reset(1, 0)
    assert policy.act(seen(**rows), np.zeros(1, np.int64)).tolist() == [choice]


def test_what_costs_more_than_a_rejection_is_rejected_but_never_a_placing():
    weights = np.zeros(NUM_TERMS + 1)
    weights[TERMS.index("kv_usage")], weights[NUM_TERMS] = 1.0, 0.35
    policy = placed_policy(PlacedWeights(weights, weights[:NUM_TERMS]), "picky")
    policy.reset(1, 0)
    who = np.zeros(1, np.int64)
    assert policy.act(seen(kv_cache_usage=(0.5, 0.4, 0.3)), who).tolist() == [2]
    full = {"kv_cache_usage": (0.5, 0.4, 0.36)}
    assert policy.act(seen(**full), who).tolist() == [4]
    assert policy.place.act(seen(**full, has_prefill=(1, 0, 0)), who).tolist() == [2]


def test_a_prompt_that_is_computed_elsewhere_costs_no_prefill_where_it_is_placed():
    weights = np.zeros(NUM_TERMS + 1)
    weights[TERMS.index("log_ttft")] = 1.0
    policy = placed_policy(PlacedWeights(weights, weights[:NUM_TERMS]), "quick")
    policy.reset(1, 0)
    rows = {"pending_prefill_tokens": (0, 50, 0), "link_busy_s": (0.01, 0.0, 0.02)}
    who = np.zeros(1, np.int64)
    assert policy.dispatch.act(seen(**rows), who).tolist() == [0]
    assert policy.place.act(seen(**rows, has_prefill=(1, 0, 0)), who).tolist() == [1]


def test_what_is_found_is_no_worse_on_validation_and_plays_so_from_its_file(split, tmp_path):
    trainer = PlacedTrainer(settings(split), tmp_path / "run")
    trainer.run()
    assert trainer.generation == 6
    assert trainer.best_scores.mean() <= trainer.first_scores.mean()
    path = trainer.export()
    policy = resolve_dispatch(str(path))
    assert policy.name == "run"
    assert Dispatch().is_learned(policy)
    played = trainer.validated_by(
        DispatchEpisodes(trainer.scenario, trainer._validation).run(policy)
    )
    np.testing.assert_array_equal(played.scores, trainer.best_scores)


class Killed(Exception):
    pass


def test_killed_search_ends_as_an_uninterrupted_one(split, tmp_path, monkeypatch):
    whole = PlacedTrainer(settings(split), tmp_path / "whole").run()
    real, made = Search.update, []

    def update(self, *arguments):
        made.append(self.generation)
        if len(made) > 3:
            raise Killed
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Search, "update", update)
        with pytest.raises(Killed):
            PlacedTrainer(settings(split), tmp_path / "parts").run()
    again = PlacedTrainer(settings(split), tmp_path / "parts")
    again.prepare()
    assert again.updates == [3]
    found = again.run()
    np.testing.assert_array_equal(found.dispatch, whole.dispatch)
    np.testing.assert_array_equal(found.place, whole.place)


def test_files_that_are_no_weights_of_both_decisions_are_refused(tmp_path):
    short = PlacedWeights(np.zeros(3), np.zeros(NUM_TERMS))
    with pytest.raises(ExportError, match=r"must have 12 and 11 finite weights, got \[\(3,\)"):
        resolve_dispatch(str(save_placed(short, tmp_path / "short")))
    path = save_placed(PlacedWeights(np.zeros(12), np.zeros(11)), tmp_path / "older")
    beside = path.parent / NAME
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"schema_version": 9}))
    with pytest.raises(ExportError, match="speaks placing schema 9"):
        resolve_dispatch(str(path))


def test_a_fleet_in_which_nothing_is_placed_is_refused(capsys, tmp_path):
    with pytest.raises(ConfigError, match="--learner search, as pd-unequal has: take another"):
        PlacedTrainer(settings("mixed-chat"), tmp_path / "run")
    with pytest.raises(SystemExit):
        main(["train", "--scenario", "mixed-chat", "--learner", "search", "--num-candidates", "0"])
    assert "num_candidates must be at least 1, got 0" in capsys.readouterr().err


def test_search_is_an_option_of_the_command(split, tmp_path, capsys):
    out = tmp_path / "searched"
    main(
        f"train --scenario {split} --learner search --max-generations 2 --num-candidates 4 "
        f"--num-validation 2 --num-requests 40 --out {out}".split()
    )
    assert "placed.npz" in capsys.readouterr().out
    assert (out / "policy" / "placed.npz").is_file()
