"""Tables of rules: what holds for every rule of every problem."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import pytest

from servegym.baselines.ordering.registry import RULES as ORDERS
from servegym.baselines.registry import RULES as DISPATCH
from servegym.baselines.rules import Entry, Range, Rules
from servegym.baselines.workflow.online.registry import RULES as ONLINE
from servegym.errors import ConfigError

TABLES = {"dispatch": DISPATCH, "order": ORDERS, "workflow": ONLINE}
ALL = [(table, name) for table, rules in TABLES.items() for name in rules.names()]


@dataclass(frozen=True)
class Toy:
    name: str = "toy"
    information: str = "predictive"
    reference: str = "a book"
    weight: float = 0.0


def toy(weight: float = 2.0) -> Toy:
    """Weigh what there is.

    Args:
        weight: Not part of the description.
    """
    return Toy(weight=weight)


TOYS = Rules(
    "toy",
    {
        "plain": Entry(Toy),
        "toy": Entry(toy, {"weight": Range(1.0, 3.0)}, {"weight": (0.5, 4.0)}, has_oracle=True),
    },
)


def test_a_rule_is_made_from_its_text():
    assert TOYS.make("toy") == Toy("toy", weight=2.0)
    assert TOYS.make("toy:") == TOYS.make("toy")
    assert TOYS.make("toy:weight=3") == Toy("toy:weight=3", weight=3.0)
    assert TOYS.make("toy-oracle:weight=3") == Toy("toy-oracle:weight=3", "oracle", weight=3.0)


def test_a_table_lists_and_describes_its_rules():
    assert list(TOYS) == ["plain", "toy"]
    assert TOYS.names() == ["plain", "toy", "toy-oracle"]
    assert TOYS.tunable() == {"toy": {"weight": Range(1.0, 3.0)}}
    assert TOYS.describe("toy-oracle") == ("weight=2", "Weigh what there is.", "a book")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plain-oracle", "unknown toy 'plain-oracle': choose one of plain, toy, toy-oracle"),
        ("ty", "unknown toy 'ty'.*did you mean toy"),
        ("toy:weight=5", "weight of toy must be a number from 0.5 to 4, got '5'"),
        ("toy-oracle:w=1", "unknown parameter of toy-oracle 'w'"),
    ],
)
def test_what_is_not_in_a_table_is_refused_in_one_sentence(text, message):
    with pytest.raises(ConfigError, match=message):
        TOYS.make(text)


@pytest.mark.parametrize(("table", "name"), ALL)
def test_every_rule_bears_its_name_and_says_what_it_does(table, name):
    rules = TABLES[table]
    assert rules.make(name).name == name
    parameters, text, _ = rules.describe(name)
    assert text.endswith(".")
    again = rules.make(f"{name}:{parameters.replace(', ', ',')}")
    assert again.information == rules.make(name).information
    assert (again.information == "oracle") == name.endswith("-oracle")


@pytest.mark.parametrize("table", TABLES)
def test_tuning_stays_within_what_a_rule_takes(table):
    rules = TABLES[table]
    tunable = rules.tunable()
    assert tunable
    for name, ranges in tunable.items():
        assert ranges
        for key, (low, high, logarithmic) in ranges.items():
            assert low < high
            assert low > 0 or not logarithmic
            for value in (low, high):
                made = rules.make(f"{name}:{key}={value:g}")
                assert value in made.params.tolist()


@pytest.mark.parametrize("table", TABLES)
def test_every_parameter_has_a_default(table):
    factories = [rule.factory for rule in TABLES[table]._entries.values()]
    assert factories
    parameters = [p for f in factories for p in inspect.signature(f).parameters.values()]
    assert parameters
    assert all(isinstance(p.default, float) for p in parameters)
