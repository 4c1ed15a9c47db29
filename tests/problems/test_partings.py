"""Where a learned policy parts from a rule: shares by hand, and what is said of them."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from servegym.baselines.registry import policy
from servegym.policy.policy import Heuristic
from servegym.problems.partings import Partings, find_partings, partings_section, sentences
from servegym.scenario import Scenario, load_scenario


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return load_scenario("azure-conv-fit")


@pytest.fixture(scope="module")
def found(scenario) -> Partings:
    episode = scenario.episode(1, load=1.0, num_requests=400)
    return find_partings(scenario, policy("what-if-added"), policy("round-robin"), episode)


def made(taken, asked, gain, predicted=None, *, in_time=False) -> Partings:
    """Make decisions of a fleet of an A and a B; requests there: 5 at A, 2 at B."""
    num = len(taken)
    predicted = np.full(num, 100.0) if predicted is None else np.array(predicted, float)
    return Partings(
        learned="mine",
        rule="rule",
        in_time=in_time,
        kinds=("A", "B", "held", "rejected"),
        taken=np.array(taken),
        asked=np.array(asked),
        gain=np.array(gain, float),
        outstanding=np.tile([5.0, 2.0], (num, 1)),
        predicted_tokens=predicted,
        prompt_tokens=np.full(num, 50.0),
    )


def test_what_is_said_by_hand():
    said = " ".join(sentences(made([0, 0, 0, 1], [0, 1, 1, 0], [0, 0.5, 0.3, -0.2])))
    assert "In 75% of 4 decisions" in said
    assert "saves all requests together 0.2 s beside the rule's" in said  # (0.5 + 0.3 - 0.2) / 3
    assert "the better one of the two in 67% of them" in said
    assert "it chooses A in 67% (the rule: 33%), B in 33% (the rule: 67%)" in said
    # A has 5 requests and B 2: it prefers A twice and B once
    assert "has 4.0 requests in the mean, the rule's 3.0" in said
    assert "tokens" not in said.partition("Where")[2].partition("The replica")[0]


def test_what_is_lost_is_said_as_well():
    said = " ".join(sentences(made([0, 0], [1, 1], [-0.5, 0.1])))
    assert "costs all requests together 0.2 s beside the rule's" in said
    said = " ".join(sentences(made([0, 0], [1, 1], [-0.5, 0.1], in_time=True)))
    assert "brings 0.2 requests within their limits fewer than the rule's" in said


def test_lengths_are_named_at_which_it_parts_more_often():
    taken, asked = [0] * 10, [0] * 8 + [1] * 2
    said = " ".join(sentences(made(taken, asked, [0] * 8 + [1.0] * 2, range(10, 110, 10))))
    assert "parts most often at 90 to 100 tokens (100% of such requests)" in said
    assert "least often at 10 to 20 (0%)" in said


def test_rejections_are_choices_as_others_are():
    said = " ".join(sentences(made([3, 0], [0, 0], [0.4, 0.0], in_time=True)))
    assert "rejected in 100% (the rule: 0%)" in said
    assert "brings 0.4 requests within their limits more" in said
    assert "The replica that it prefers" not in said  # it prefers none


def test_who_does_the_same_differs_in_nothing():
    section = partings_section(made([0, 1], [0, 1], [0, 0]))
    assert len(section.sentences) == 1
    assert section.sentences[0].startswith("In 0% of 2 decisions")
    assert section.figure == ""


def test_an_episode_is_played_and_the_rule_is_asked(found):
    assert len(found.taken) == len(found.gain) == 400
    assert found.kinds[-2:] == ("held", "rejected")
    assert found.asked.tolist() == [i % 8 for i in range(400)]  # whoever plays
    parted = found.taken != found.asked
    assert 0.5 < parted.mean() < 1.0
    assert (found.gain[~parted] == 0).all()
    assert found.gain[parted].mean() > 0.05  # a planner beats taking turns
    assert (found.gain[parted] > 0).mean() > 0.8
    assert partings_section(found).figure.startswith("<img")


def test_a_rule_that_is_asked_does_not_change_what_is_played(scenario, found):
    episode = scenario.episode(1, load=1.0, num_requests=400)
    again = find_partings(scenario, policy("what-if-added"), policy("min-kv"), episode)
    assert isinstance(policy("min-kv"), Heuristic)
    np.testing.assert_array_equal(again.taken, found.taken)
