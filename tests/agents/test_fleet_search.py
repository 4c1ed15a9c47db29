"""Learning both decisions of a fleet in which KV moves: scores, search and files."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import yaml

from servegym.baselines.registry import RULES
from servegym.cli import main
from servegym.cluster.state import EV_MIGRATE
from servegym.errors import ConfigError, ExportError
from servegym.export.fleet import FleetWeights, fleet_policy, save_fleet
from servegym.export.manifest import NAME
from servegym.export.resolve import resolve_dispatch
from servegym.policy.contract import REPLICA_FEATURES, REQUEST_FEATURES
from servegym.policy.migrating import Migrating
from servegym.policy.move_scores import by_freeness
from servegym.policy.placed_scores import NUM_TERMS, TERMS, PlacedWeights, placed_policy
from servegym.policy.policy import Observations
from servegym.policy.turn_scores import TURN_TERMS
from servegym.problems.dispatch import Dispatch, DispatchEpisodes
from servegym.scenario import load_scenario
from servegym.train.fleet_search import FleetSearchTrainer
from servegym.train.fleet_search_settings import FleetSearchTraining
from servegym.train.fleet_spaces import MigrateSpace, RetainSpace, RuleNumbers, fleet_space
from servegym.train.search import Search
from servegym.train.validation import Validated

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


FULL = {
    "name": "full",
    "engine": {"block_size": 16, "max_num_seqs": 16, "prefix_caching": False},
    "fleet": [{"gpu": "L4", "count": 4, "num_blocks": 120, "link": LINK}],
    "migration": {"interval_s": 0.05, "last_stage_blocks": 2},
    "workload": {
        "kind": "generated",
        "rate_rps": 2.0,
        "prompt": {"medians_tokens": [150.0], "max_tokens": 700},
        "output": {"medians_tokens": [100.0], "max_tokens": 600},
    },
    "objective": "tail",
}


class AsPython:
    """A rule of which nobody knows that it is one."""

    def __init__(self, inner):
        self.name, self.information, self.needs = inner.name, inner.information, inner.needs
        self.reset, self.act = inner.reset, inner.act


TIERED = {
    "name": "tiered",
    "engine": {"block_size": 64, "max_num_seqs": 16},
    "fleet": [{"gpu": "L4", "count": 2, "num_blocks": 500, "host_kv": {"gib": 4, "gb_per_s": 20}}],
    "kv_tiers": {"interference": 2.0},
    "workload": {
        "kind": "agents",
        "rate_rps": 0.3,
        "first_prompt": {"medians_tokens": [4000.0], "max_tokens": 8000},
        "system_prompt_tokens": 1024,
        "max_context_tokens": 16000,
        "max_pause_s": 30.0,
    },
}


@pytest.fixture
def tiered(tmp_path):
    path = tmp_path / "tiered.yaml"
    path.write_text(yaml.safe_dump(TIERED))
    return str(path)


@pytest.fixture
def full(tmp_path):
    path = tmp_path / "full.yaml"
    path.write_text(yaml.safe_dump(FULL))
    return str(path)


@pytest.fixture
def split(tmp_path):
    path = tmp_path / "split.yaml"
    path.write_text(yaml.safe_dump(SPLIT))
    return str(path)


def settings(scenario, **changes):
    small = FleetSearchTraining(
        scenario=scenario,
        load=(2.0, 5.0),
        max_minutes=math.inf,
        max_generations=6,
        num_candidates=8,
        num_episodes=2,
        num_validation=4,
        num_requests=80,
        validation_requests=80,
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


def placed_weights(dispatch, place) -> FleetWeights:
    return FleetWeights("placed", {"dispatch": dispatch, "place": place})


@pytest.mark.parametrize("fixture", ["split", "full", "tiered"])
def test_what_is_found_is_no_worse_on_validation_and_plays_so_from_its_file(
    fixture, request, tmp_path
):
    scenario = request.getfixturevalue(fixture)
    trainer = FleetSearchTrainer(settings(scenario, max_generations=5), tmp_path / "run")
    trainer.run()
    assert trainer.generation == 5
    assert trainer.best_scores.mean() <= trainer.first_scores.mean()
    path = trainer.export()
    policy = resolve_dispatch(str(path))
    assert policy.name == "run"
    assert Dispatch().is_learned(policy)
    assert policy.information == "predictive"
    played = trainer.validated_by(
        DispatchEpisodes(trainer.scenario, trainer._validation).run(policy)
    )
    np.testing.assert_array_equal(played.scores, trainer.best_scores)
    said = json.loads((path.parent / NAME).read_text())["training"]
    gains = trainer.first_scores - trainer.best_scores
    assert said["validation_gain"] == round(gains.mean(), 5)
    assert said["validation_gain_error"] == round(gains.std(ddof=1) / 2.0, 5)  # of four episodes


@pytest.mark.parametrize(
    ("gains", "kept"),
    [
        # means of 0.15, 0.075 and 0.125, with standard errors of 0.05, 0.085 and 0.075
        ((0.1, 0.1, 0.1, 0.3), True),
        ((0.3, -0.1, 0.0, 0.1), False),
        ((0.05, 0.05, 0.05, 0.35), False),
        ((0.0, 0.0, 0.0, 0.0), False),
        ((-0.1, -0.1, -0.1, -0.1), False),
    ],
)
def test_the_start_is_kept_unless_the_gain_is_beyond_two_standard_errors(
    gains, kept, tiered, tmp_path
):
    trainer = FleetSearchTrainer(settings(tiered), tmp_path / "run")
    trainer.first_scores = trainer.best_scores = np.array([1.0, 2.0, 3.0, 4.0])
    found = Validated(trainer.first_scores - gains, 1.0, 1.0)
    assert trainer.is_better(found) is kept
    # beyond luck, and behind something better that was found before
    trainer.best_scores = trainer.first_scores - 0.2
    assert not trainer.is_better(found)


def test_without_a_margin_any_gain_will_do(tiered, tmp_path):
    trainer = FleetSearchTrainer(settings(tiered, margin=0.0), tmp_path / "run")
    trainer.first_scores = trainer.best_scores = np.array([1.0, 2.0, 3.0, 4.0])
    for gain, kept in ((0.1, True), (0.0, False), (-0.1, False)):
        gains = gain + np.array([0.3, -0.3, 0.1, -0.1])
        assert trainer.is_better(Validated(trainer.first_scores - gains, 1.0, 1.0)) is kept


def test_episodes_that_choose_are_as_long_as_those_of_an_evaluation(tiered, tmp_path):
    scenario = load_scenario(tiered)
    for given, wanted in ((None, scenario.num_requests), (30, 30)):
        config = settings(tiered, num_validation=2, validation_requests=given)
        trainer = FleetSearchTrainer(config, tmp_path / str(given))
        assert [len(episode.table) for episode in trainer._validation] == [wanted] * 2
    assert scenario.num_requests != 80


class Killed(Exception):
    pass


def test_killed_search_ends_as_an_uninterrupted_one(split, tmp_path, monkeypatch):
    whole = FleetSearchTrainer(settings(split), tmp_path / "whole").run()
    real, made = Search.update, []

    def update(self, *arguments):
        made.append(self.generation)
        if len(made) > 3:
            raise Killed
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Search, "update", update)
        with pytest.raises(Killed):
            FleetSearchTrainer(settings(split), tmp_path / "parts").run()
    again = FleetSearchTrainer(settings(split), tmp_path / "parts")
    again.prepare()
    assert again.updates == [3]
    found = again.run()
    assert set(found.arrays) == {"dispatch", "place"}
    for name, weights in found.arrays.items():
        np.testing.assert_array_equal(weights, whole.arrays[name])


def test_files_that_are_no_weights_of_both_decisions_are_refused(tmp_path):
    short = placed_weights(np.zeros(3), np.zeros(NUM_TERMS))
    with pytest.raises(ExportError, match="finite weights, 12 of dispatch, 11 of place; got"):
        resolve_dispatch(str(save_fleet(short, tmp_path / "short")))
    path = save_fleet(placed_weights(np.zeros(12), np.zeros(11)), tmp_path / "older")
    beside = path.parent / NAME
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"schema_version": 9}))
    with pytest.raises(ExportError, match="speaks placing schema 9"):
        resolve_dispatch(str(path))
    moves = by_freeness(3.0, 3.0, waiting_first=True)
    nobody = FleetWeights("migrating", moves._asdict(), "nobody")
    with pytest.raises(ExportError, match="must name a rule that dispatches, got 'nobody'"):
        resolve_dispatch(str(save_fleet(nobody, tmp_path / "nobody")))
    broken = FleetWeights("migrating", moves._replace(waiting=np.full(5, np.nan))._asdict(), "mct")
    with pytest.raises(ExportError, match="must have finite weights, 7 of source, 7 of target"):
        resolve_dispatch(str(save_fleet(broken, tmp_path / "broken")))


def test_scenarios_with_one_decision_and_rules_outside_the_space_are_refused(capsys, tmp_path):
    with pytest.raises(ConfigError, match="for --learner search: take another learner"):
        FleetSearchTrainer(settings("mixed-chat"), tmp_path / "run")
    with pytest.raises(ConfigError, match="start must be left out where requests are placed, got"):
        FleetSearchTrainer(settings("pd-equal", start="mct+min-kv"), tmp_path / "run")
    for start in ("mct", "mct+stay", "mct+freeness-longest"):
        with pytest.raises(ConfigError, match=r"start must be DISPATCH\+freeness or"):
            MigrateSpace(start)
    for start in ("mct", "mct+by-tool", "mct+freeness"):
        with pytest.raises(ConfigError, match=r"RETENTION one of lru, ttl, lognormal, offload-wi"):
            RetainSpace(start)
    with pytest.raises(ConfigError, match="parameter seconds of ttl must be a number"):
        RetainSpace("mct+ttl:seconds=soon")
    with pytest.raises(SystemExit):
        main(["train", "--scenario", "mixed-chat", "--learner", "search", "--num-candidates", "0"])
    assert "num_candidates must be at least 1, got 0" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="validation_requests must be at least 1, got 0"):
        settings("pd-equal", validation_requests=0)
    with pytest.raises(ConfigError, match="num_validation must be at least 2, as one episode does"):
        settings("pd-equal", num_validation=1)
    with pytest.raises(ConfigError, match="margin must be at least 0 and finite, got -1"):
        settings("pd-equal", margin=-1.0)


@pytest.mark.parametrize(
    "text",
    [
        "added-delay:prefill=0.3,decode=4",
        "prefix-load:weight=0.02,eta=1.5",  # eta has no logarithmic range
        "added-delay-reject:prefill=2,shrink=0.4,ttft=0.7",  # nor ttft; shrink is not tuned
        "llumnix",
    ],
)
def test_a_search_begins_with_the_very_numbers_of_its_rule(text):
    numbers = RuleNumbers(text)
    made, wanted = RULES.make(numbers.text(numbers.start)), RULES.make(text)
    np.testing.assert_allclose(made.params, wanted.params, rtol=1e-8)
    assert made.decide is wanted.decide
    tunable = RULES.tunable().get(text.partition(":")[0], {})
    assert len(numbers.start) == len(tunable)
    for i, (key, (low, high, logarithmic)) in enumerate(tunable.items()):
        beyond = numbers.start.copy()
        beyond[i] += 1000.0
        value = RULES.make(numbers.text(beyond)).params[made.param_names.index(key)]
        assert value > high if logarithmic else value == high
        beyond[i] -= 2000.0
        value = RULES.make(numbers.text(beyond)).params[made.param_names.index(key)]
        assert value < low if logarithmic else value == low


@pytest.mark.parametrize("rule", ["freeness", "freeness-waiting"])
def test_the_search_for_moves_begins_with_the_very_rule_choice_for_choice(rule, full):
    scenario = load_scenario(full)
    text = f"added-delay:decode=0.7+{rule}:source_below=4.5,target_above=2.5"
    space = fleet_space(scenario, text)
    assert isinstance(space, MigrateSpace)
    learned = fleet_policy(space.weights(space.start), "start")
    episodes = [scenario.episode(seed, load=2.0, num_requests=300) for seed in range(3)]
    played, known = (
        DispatchEpisodes(scenario, episodes).run(policy, record=True)
        for policy in (learned, resolve_dispatch(text))
    )
    moved = 0
    for env in range(3):
        events = known.events(env)
        np.testing.assert_array_equal(played.events(env), events)
        moved += known.outcomes(env)["num_migrations"].sum()
    assert moved > 50
    assert sum((known.outcomes(env)["paused_s"] > 0).sum() for env in range(3)) > 5


@pytest.mark.parametrize(
    "rule",
    [
        "lru",
        "ttl:seconds=3",
        "lognormal:quantile=0.8,most=9",
        "offload-within:seconds=4",
    ],
)
def test_the_search_for_what_is_kept_begins_with_the_very_rule_choice_for_choice(rule, tiered):
    scenario, text = load_scenario(tiered), f"added-delay:decode=0.7+{rule}"
    space = fleet_space(scenario, text)
    assert isinstance(space, RetainSpace)
    assert len(space.start) == 2 + 4 * len(TURN_TERMS)
    # sizes are logarithms of up to e^4 thousand tokens: their weights vary a quarter as much
    spreads = dict(zip(TURN_TERMS, space.spread[2 : 2 + len(TURN_TERMS)].tolist(), strict=True))
    assert spreads["tokens"] == spreads["constant"] / 4 > 0
    learned, known = fleet_policy(space.weights(space.start), "start"), resolve_dispatch(text)
    episodes = [scenario.episode(seed, load=2.0, num_requests=80) for seed in range(2)]
    one, other = (DispatchEpisodes(scenario, episodes).run(policy) for policy in (learned, known))
    for env in range(2):
        assert one.outcomes(env).tobytes() == other.outcomes(env).tobytes()
    assert other.outcomes(0)["cached_tokens"].sum() > 0


def moves_of(full, **changed) -> tuple[int, int]:
    """How many requests move while they wait and while they decode, under changed weights."""
    scenario = load_scenario(full)
    weights = by_freeness(3.0, 3.0, waiting_first=True)
    weights = weights._replace(
        **{name: change(getattr(weights, name)) for name, change in changed.items()}
    )
    policy = fleet_policy(FleetWeights("migrating", weights._asdict(), "added-delay"), "changed")
    episode = scenario.episode(0, load=2.0, num_requests=300)
    events = DispatchEpisodes(scenario, [episode]).run(policy, record=True).events(0)
    paused = events["value"][events["kind"] == EV_MIGRATE] > 0.0
    return int((~paused).sum()), int(paused.sum())


def test_weights_say_who_moves(full):
    both = moves_of(full)
    assert min(both) > 0

    def nobody(weights):
        return np.concatenate([[-50.0], weights[1:]])

    assert moves_of(full, waiting=nobody)[0] == 0
    assert moves_of(full, decoding=nobody)[1] == 0
    assert moves_of(full, waiting=nobody, decoding=nobody) == (0, 0)
    # a threshold that no target is above, and one that every source is
    assert moves_of(full, target=lambda w: np.concatenate([w[:-1], [50.0]])) == (0, 0)
    assert sum(moves_of(full, source=lambda w: np.concatenate([w[:-1], [-50.0]]))) > sum(both)


def test_a_policy_that_is_not_compiled_dispatches_beside_scores_of_moves(full):
    scenario = load_scenario(full)
    weights = FleetWeights(
        "migrating", by_freeness(3.0, 3.0, waiting_first=True)._asdict(), "added-delay"
    )
    policy = fleet_policy(weights, "compiled")
    assert isinstance(policy, Migrating)
    slow = replace(policy, dispatch=AsPython(policy.dispatch), name="slow")
    episodes = [scenario.episode(seed, load=2.0, num_requests=200) for seed in range(2)]
    one, other = (DispatchEpisodes(scenario, episodes).run(each) for each in (policy, slow))
    for env in range(2):
        assert one.outcomes(env).tobytes() == other.outcomes(env).tobytes()
    assert one.outcomes(0)["num_migrations"].sum() > 0


def test_search_is_an_option_of_the_command(split, tmp_path, capsys):
    out = tmp_path / "searched"
    main(
        f"train --scenario {split} --learner search --max-generations 2 --num-candidates 4 "
        f"--num-validation 2 --num-requests 40 --validation-requests 40 --out {out}".split()
    )
    assert "placed.npz" in capsys.readouterr().out
    assert (out / "policy" / "placed.npz").is_file()


def test_where_requests_migrate_it_is_what_trains(full, tmp_path, capsys):
    out = tmp_path / "searched"
    main(
        f"train --scenario {full} --max-generations 1 --num-candidates 2 --start mct+freeness "
        f"--num-validation 2 --num-requests 40 --validation-requests 40 --out {out}".split()
    )
    assert "migrating.npz" in capsys.readouterr().out
    main(
        f"evaluate --scenario {full} --seeds 2 --num-requests 40 --policies mct+freeness "
        f"{out / 'policy' / 'migrating.npz'}".split()
    )
    assert "searched" in capsys.readouterr().out
