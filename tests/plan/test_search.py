"""The search finds what trying every fleet finds, and the tries are what they say."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from servegym.cluster.spec import ReplicaType
from servegym.plan.answer import answer
from servegym.plan.certainty import Worlds
from servegym.plan.document import answer_document
from servegym.plan.options import find_options, usd_per_h
from servegym.plan.prices import Price
from servegym.plan.question import Question
from servegym.plan.search import Search
from servegym.plan.trials import Course, busiest
from servegym.workloads.table import RequestTable

from ..toys import constant_grid  # noqa: TID252 - tests are no package

GPUS = ("A100-SXM-80GB", "H100-SXM-80GB", "L40S")


def drawn_trace(rng: np.random.Generator, num_requests: int = 160) -> RequestTable:
    """A stream whose rate swings, with prompts of very different lengths."""
    rate_rps = 30.0 * (1.3 + np.sin(np.linspace(0.0, 6.0, num_requests)))
    return RequestTable.build(
        np.cumsum(rng.exponential(1.0, num_requests) / rate_rps),
        rng.integers(100, 3000, num_requests),
        rng.integers(20, 200, num_requests),
    )


@pytest.mark.parametrize("seed", range(4))
def test_search_finds_the_rent_that_trying_every_fleet_finds(seed):
    rng = np.random.default_rng(seed)
    question = Question(
        gpus=GPUS,
        degrees=(1,),
        rules=("round-robin", "prefix-load"),
        ttft_s=float(rng.uniform(0.3, 1.0)),
        tpot_s=float(rng.uniform(0.02, 0.05)),
        attainment=0.9,
        max_replicas=5,
    )
    prices = {
        name: Price(usd_per_h=round(float(rng.uniform(1.0, 3.0)), 2), source="drawn")
        for name in GPUS
    }
    table = drawn_trace(rng)
    options, _ = find_options(question, prices)
    types = [option.replica for option in options]
    search = Search(Course.over(question, types, table, least=10), options)
    assert len(search.course.stretches) == 3
    alone = [search.alone(i) for i in range(len(options))]
    rents = [search.cost(fleet) for fleet in alone if fleet is not None]
    mixed = search.mixed(min(rents, default=None))
    rents += [search.cost(mixed)] if mixed is not None else []

    everything = Course(question, types, [table])
    fleets = [
        fleet
        for fleet in itertools.product(range(6), repeat=3)
        if 0 < sum(fleet) <= 5 and sum(count > 0 for count in fleet) <= 2
    ]
    trials = everything.try_all([(fleet, rule, 0) for fleet in fleets for rule in question.rules])
    allowed = question.allowed_late(len(table))
    holding = [usd_per_h(t.fleet, options) for t in trials if t.late <= allowed]
    assert holding  # else nothing would be searched for
    assert min(rents) == min(holding)


def test_trial_counts_who_is_late_for_what():
    # a step takes 1 s; the second request waits for the first one's two steps and its own
    kind = ReplicaType("toy", constant_grid(1.0), num_blocks=100, max_num_seqs=1)
    table = RequestTable.build(np.array([0.0, 0.0, 10.0]), [10, 10, 10], [2, 2, 2])
    question = Question(gpus=("L40S",), ttft_s=1.5, tpot_s=0.5, attainment=0.5)
    trial = Course(question, [kind], [table]).try_all([((1,), "round-robin", 0)])[0]
    assert (trial.num_requests, trial.late_first, trial.slow, trial.late) == (3, 1, 3, 3)
    # one of three may be late, two are served after a step
    assert [trial.ttft_s, trial.tpot_s, trial.pressure] == pytest.approx([1.0, 1.0, 2.0])
    two = Course(question, [kind], [table]).try_all([((2,), "round-robin", 0)])[0]
    assert (two.late_first, two.slow) == (0, 3)


def test_busiest_stretch_is_where_tokens_come_fastest():
    arrival_s = np.array([0.0, 10.0, 20.0, 21.0, 22.0, 40.0])
    table = RequestTable.build(arrival_s, [100] * 6, [10] * 6)
    part = busiest(table, 3)
    assert part.arrival_s.tolist() == [0.0, 1.0, 2.0]


def test_fleet_is_asked_in_the_same_worlds_and_more_replicas_hold_in_more():
    question = Question(gpus=("L40S",), degrees=(1,), ttft_s=1.0, rules=("round-robin",))
    prices = {"L40S": Price(usd_per_h=1.0, source="test")}
    options, _ = find_options(question, prices)
    table = drawn_trace(np.random.default_rng(3), 120)
    course = Course.over(question, [options[0].replica], table)
    worlds = Worlds(course, options, 12)
    some, more = (worlds.ask((count,), "round-robin") for count in (4, 12))
    assert some.asked == 12
    assert 0 < more.held < 12  # the first token alone comes too late where its factor is large
    assert some.held <= more.held
    assert more.late_first + more.slow >= 12 - more.held
    assert Worlds(course, options, 12).ask((4,), "round-robin") == some
    fleet, rule, certainty = Worlds(replace_spread(course), options, 12).safe(
        [((1,), "round-robin"), ((12,), "round-robin")]
    )
    assert (fleet, rule) == ((12,), "round-robin")
    assert certainty.is_safe


def replace_spread(course: Course) -> Course:
    """Allow so much for the first token that no factor on it matters."""
    question = course.question.model_copy(update={"ttft_s": 1000.0, "tpot_s": 0.08})
    return replace(course, question=question)


def test_stages_hold_a_model_that_no_degree_of_a_gpu_does():
    # an A40 has 48 GB and no collectives over four: 141 GB of weights need stages
    question = Question(model="Llama-3.1-70B", gpus=("A40",), degrees=(1, 2), stages=(1, 8))
    options, left_out = find_options(question, {"A40": Price(usd_per_h=0.5, source="test")})
    assert [(one.name, one.usd_per_h) for one in options] == [("A40 x1 pp8", 4.0)]
    assert [one.name for one in left_out] == ["A40 x1", "A40 x2", "A40 x2 pp8"]
    assert left_out[2].why == "16 GPUs are more than the 8 of a node"


def test_drafts_are_replicas_of_their_own():
    question = Question(
        gpus=("L40S",), degrees=(1,), stages=(1, 2), drafts=(0, 3), acceptance=0.7, num_worlds=2
    )
    options, left_out = find_options(question, {"L40S": Price(usd_per_h=1.0, source="test")})
    names = ["L40S x1", "L40S x1 3 drafts", "L40S x1 pp2"]
    assert sorted(one.name for one in options) == names
    drafting = next(one for one in options if one.entry.speculative_config)
    assert drafting.replica.speculation.acceptance == (0.7, 0.7**2, 0.7**3)
    plain = next(one for one in options if one.name == "L40S x1")
    assert (plain.status, drafting.status) == (plain.cost.status, "extrapolated")
    assert [(one.name, one.why) for one in left_out] == [
        ("L40S x1 pp2 3 drafts", "stages of a pipeline and drafts do not go together yet")
    ]


def test_drafts_keep_limits_that_no_fleet_keeps_without():
    # eight L40S keep 30 ms with three drafts of which 0.8 are accepted, and not without; of nine in
    # ten requests, as those of a few tokens may have a step for each
    question = Question(
        gpus=("L40S",),
        degrees=(1,),
        drafts=(0, 3),
        acceptance=0.8,
        ttft_s=5.0,
        tpot_s=0.03,
        attainment=0.9,
        max_replicas=8,
        num_worlds=3,
    )
    prices = {"L40S": Price(usd_per_h=1.0, source="test")}
    found = answer(question, prices, drawn_trace(np.random.default_rng(7), 120))
    assert found.best is not None
    document = answer_document(found)
    (entry,) = document["best"]["fleet"]
    assert entry["num_speculative_tokens"] == 3
    assert found.best.certainty is not None


def test_answer_says_why_each_other_fleet_loses():
    question = Question(
        gpus=("L40S", "H100-SXM-80GB"), degrees=(1, 3, 8), max_replicas=8, num_worlds=3
    )
    prices = {name: Price(usd_per_h=2.0, source="test") for name in question.gpus}
    table = drawn_trace(np.random.default_rng(7), 120)
    classes = np.arange(120, dtype=np.int16) % 3  # of a trace, which a plan has no use for
    found = answer(question, prices, replace(table, slo_class=classes))
    assert found.best is not None
    assert found.best.trial.late <= question.allowed_late(120)
    assert {one.name for one in found.left_out} == {"L40S x3", "H100-SXM-80GB x3"}
    assert found.best.certainty.asked == 3
    assert all(one.why for one in found.others)
    reasons = " ".join(one.why for one in found.others)
    assert "more" in reasons
    assert "the same fleet under" in reasons
    rents = [one.usd_per_h for one in found.frontier]
    late = [one.trial.late for one in found.frontier]
    assert rents == sorted(rents)
    assert late == sorted(late, reverse=True)
