"""Rules that say which requests move: their names, and what they make of a cluster."""

from __future__ import annotations

import pytest

from servegym.baselines.migration.registry import MIGRATIONS, migration
from servegym.baselines.ordering.registry import RULES as ORDERS
from servegym.baselines.placement import PLACEMENTS
from servegym.baselines.registry import RULES
from servegym.cluster.spec import MigrationRules
from servegym.errors import ConfigError
from servegym.evaluate.tune import candidates
from servegym.export.resolve import resolve_dispatch
from servegym.policy.migrating import Migrating
from servegym.problems.dispatch import Dispatch
from servegym.scenario import load_scenario


def test_no_migration_has_the_name_of_another_rule():
    assert len(list(MIGRATIONS)) == 5
    assert not set(MIGRATIONS.names()) & {*RULES.names(), *ORDERS.names(), *PLACEMENTS.names()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stay", {"rule": "none"}),
        ("queued-only:gap=4", {"rule": "queues", "queue_gap": 4}),
        ("freeness", {"rule": "freeness", "victim": "shortest"}),
        ("freeness-longest:source_below=-2", {"victim": "longest", "source_below": -2.0}),
        (
            "freeness-waiting:target_above=7.5",
            {"victim": "first-waiting-or-shortest", "target_above": 7.5},
        ),
    ],
)
def test_a_rule_sets_how_requests_move_and_nothing_else(text, expected):
    spec = load_scenario("near-full-kv").spec
    policy = resolve_dispatch(f"llumnix+{text}")
    assert isinstance(policy, Migrating)
    assert policy.name == f"llumnix+{text}"
    rules = policy.spec(spec).migration
    for name, value in expected.items():
        assert getattr(rules, name) == value
    kept = {"interval_s", "last_stage_blocks", "max_stages"}
    assert {name: getattr(rules, name) for name in kept} == {
        name: getattr(spec.migration, name) for name in kept
    }
    assert isinstance(rules, MigrationRules)


def test_pairs_of_rules_are_compared_where_requests_migrate():
    problem, scenario = Dispatch(), load_scenario("near-full-kv")
    policies = [problem.resolve(text) for text in problem.compared(scenario)]
    assert len(policies) > 10
    assert all(isinstance(policy, Migrating) for policy in policies)


def test_it_is_tuned_together_with_the_dispatcher():
    parts = Dispatch().parts("added-delay+freeness")
    assert [text for _, text in parts] == ["added-delay", "freeness"]
    tried = candidates(parts, 4)
    assert len(set(tried)) == 4
    assert all("source_below" in text and "decode" in text for text in tried[1:])


def test_where_nothing_can_move_it_is_refused():
    policy = resolve_dispatch("llumnix+freeness")
    assert isinstance(policy, Migrating)
    with pytest.raises(ConfigError, match=r"says which requests move .* take the dispatch"):
        policy.spec(load_scenario("mixed-chat").spec)
    with pytest.raises(ConfigError, match="parameter gap of queued-only must be a number from 1"):
        migration("queued-only:gap=0")
