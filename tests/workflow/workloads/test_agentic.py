"""Shapes and figures of text-to-SQL, map-reduce, search and planner jobs."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.workflow.job import StageKind
from servegym.workflow.workloads.planner import PlannerExecutor
from servegym.workflow.workloads.registry import draw
from servegym.workflow.workloads.text_to_sql import FIGURES, NOMINAL_S, Step
from servegym.workflow.workloads.tree_search import TreeSearch


def parents_of(job, stage):
    return sorted(job.parent[job.child == stage].tolist())


@pytest.fixture(scope="module")
def questions():
    return draw("text-to-sql", np.random.default_rng(0), 1500)


def test_question_takes_the_steps_of_the_pipeline_in_order(questions):
    job = next(job for job in questions if (job.label == Step.REVISE).sum() == 2)
    steps = [Step(label).name for label in job.label]
    assert steps[:5] == ["RETRIEVE", "KEYWORDS", "RETRIEVE", "RETRIEVE", "RETRIEVE"]
    assert steps[5:13] == ["CANDIDATE"] * 8
    assert steps[13:18] == ["REVISE", "REVISE", "TEST", "WRITE_TESTS", "TEST"]
    assert set(steps[18:-1]) == {"EVALUATE"}
    assert steps[-1] == "TEST"
    assert parents_of(job, 13) == list(range(5, 13))
    assert parents_of(job, 14) == [13]
    assert parents_of(job, 15) == [*range(5, 13), 14]
    assert job.hidden[13:15].all()


def test_counts_are_those_of_the_source(questions):
    revisions = np.array([(job.label == Step.REVISE).sum() for job in questions])
    evaluations = np.array([(job.label == Step.EVALUATE).sum() for job in questions])
    for counts, low, high in ((revisions, 0, 10), (evaluations, 2, 7)):
        shares = np.bincount(counts, minlength=high + 1)[low:] / len(counts)
        assert len(shares) == high - low + 1
        assert np.abs(shares - 1 / len(shares)).max() < 4 * np.sqrt(0.25 / len(counts))
    hidden = np.array([(job.hidden & (job.label == Step.EVALUATE)).sum() for job in questions])
    assert (hidden == evaluations - 2).all()


@pytest.mark.parametrize("step", list(Step))
def test_lengths_have_the_means_of_the_table(questions, step):
    for key, mean in (
        ("prompt_tokens", FIGURES[step].prompt_tokens),
        ("output_tokens", FIGURES[step].output_tokens),
    ):
        # one number a job: the stages of a job share its schema
        got = np.array(
            [getattr(job, key)[job.label == step].mean() for job in questions if step in job.label]
        )
        assert abs(got.mean() - mean) < 4 * got.std() / np.sqrt(len(got)) + 0.5


def test_deadlines_are_multiples_of_an_unloaded_question_by_class(questions):
    # sums of the source's tables by hand: 37.525, 77.98 and 66.81 s
    assert pytest.approx((37.525 + 77.981 + 66.813) / 3, abs=0.01) == NOMINAL_S
    deadlines = np.array([job.deadline_s for job in questions])
    assert set(deadlines) == {NOMINAL_S, 2 * NOMINAL_S}
    assert abs((deadlines == NOMINAL_S).mean() - 0.5) < 4 * 0.5 / np.sqrt(len(deadlines))
    (job,) = draw(
        "text-to-sql", np.random.default_rng(0), 1, deadline_scales=(3.0,), class_shares=(1.0,)
    )
    assert job.deadline_s == 3 * NOMINAL_S


def test_documents_are_summarised_chunk_by_chunk_and_then_eight_at_a_time():
    jobs = draw("map-reduce", np.random.default_rng(0), 200)
    assert len(jobs) == 200
    for job in jobs:
        maps = np.flatnonzero(job.label == 0)
        assert not np.isin(maps, job.child).any()
        assert (job.prompt_tokens[maps[:-1]] == 4150).all()
        assert 150 < job.prompt_tokens[maps[-1]] <= 4150
        reduces = np.flatnonzero(job.label == 1)
        for stage in reduces:
            parents = parents_of(job, stage)
            assert 2 <= len(parents) <= 8
            assert job.prompt_tokens[stage] == 150 + job.output_tokens[parents].sum()
        # every summary but the last goes into one other
        assert (np.bincount(job.parent, minlength=job.num_stages)[:-1] == 1).all()
        sizes = 4.0 * job.output_tokens[job.parent]
        assert (job.data_bytes == sizes).all()


def test_summaries_are_as_long_as_the_abstracts_they_were_fitted_to():
    lengths = np.concatenate(
        [job.output_tokens for job in draw("map-reduce", np.random.default_rng(3), 1500)]
    )
    # quartiles and mean of the 14,128 lengths: 114, 166, 241 and 295.9
    assert np.abs(np.quantile(lengths, (0.25, 0.5, 0.75)) / (114, 166, 241) - 1).max() < 0.05
    assert lengths.mean() == pytest.approx(295.9, rel=0.06)


def test_best_of_n_shares_the_prompt_and_scores_every_answer():
    (job,) = draw("best-of-n", np.random.default_rng(0), 1, n=5)
    assert job.label.tolist() == [0, *[1] * 5, *[2] * 5, 3]
    for k in range(5):
        assert parents_of(job, 1 + k) == [0]
        assert parents_of(job, 6 + k) == [1 + k]
        path = job.prompt_tokens[0] + job.output_tokens[1 + k]
        assert job.prompt_tokens[6 + k] == path
        (edge,) = np.flatnonzero((job.parent == 1 + k) & (job.child == 6 + k))
        assert job.shared_tokens[edge] == path
    assert parents_of(job, 11) == [6, 7, 8, 9, 10]
    assert not job.hidden.any()


def test_tree_search_continues_the_kept_paths_and_hides_what_depends_on_scores():
    job = next(
        job
        for job in draw("tree-search", np.random.default_rng(0), 50, beam=2, width=3)
        if (job.label == 3).sum() == 3
    )
    samples = np.flatnonzero(job.label == 1)
    assert len(samples) == 3 * 6
    first_select = int(np.flatnonzero(job.label == 3)[0])
    assert not job.hidden[: first_select + 1].any()
    assert job.hidden[first_select + 1 :].all()
    for stage in samples[6:]:
        llm = [p for p in parents_of(job, stage) if job.kind[p] == StageKind.LLM]
        (parent,) = llm
        assert job.label[parent] == 1
        assert job.prompt_tokens[stage] == job.prompt_tokens[parent] + job.output_tokens[parent]
    # two paths are kept, three continuations of each
    kept, counts = np.unique(
        [p for s in samples[6:12] for p in parents_of(job, s) if job.label[p] == 1],
        return_counts=True,
    )
    assert counts.tolist() == [3, 3]
    assert set(kept) <= set(samples[:6])


def test_depth_of_a_search_is_geometric_up_to_its_limit():
    family = TreeSearch(beam=1, width=1, done_probability=0.5, max_depth=3)
    rng = np.random.default_rng(0)
    depths = [(family.job(rng).label == 3).sum() for _ in range(2000)]
    shares = np.bincount(depths, minlength=4)[1:] / 2000
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.045)


def test_planner_repeats_the_conversation_and_hides_what_the_plan_will_say():
    family = PlannerExecutor(replan_probability=1.0, max_rounds=2, mean_calls=2.0)
    job = family.job(np.random.default_rng(0))
    plans, joins = np.flatnonzero(job.label == 0), np.flatnonzero(job.label == 1)
    (answer,) = np.flatnonzero(job.label == 2)
    assert len(plans) == len(joins) == 2
    assert job.hidden[job.kind == StageKind.TOOL].all()
    known = np.flatnonzero(~job.hidden).tolist()
    assert known == [plans[0], joins[0], answer]
    # the second plan sees all that was said and shares all of it with the judgement before it
    whole = job.prompt_tokens[joins[0]] + job.output_tokens[joins[0]]
    (edge,) = np.flatnonzero((job.parent == joins[0]) & (job.child == plans[1]))
    assert job.shared_tokens[edge] == job.prompt_tokens[plans[1]] == whole
    (edge,) = np.flatnonzero((job.parent == joins[1]) & (job.child == answer))
    assert job.shared_tokens[edge] == job.prompt_tokens[answer]


def test_planner_calls_functions_as_often_and_as_long_as_it_says():
    jobs = draw("planner-executor", np.random.default_rng(1), 3000)
    label = np.concatenate([job.label for job in jobs])
    took_s = np.concatenate([job.tool_s for job in jobs])
    known_s = np.concatenate([job.expected_tool_s for job in jobs])
    calls = label >= 3
    shares = np.bincount(label[calls] - 3) / calls.sum()
    assert shares == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=4 * 0.5 / np.sqrt(calls.sum()))
    for tool, median_s, sigma in ((3, 0.8, 0.6), (4, 0.25, 0.8), (5, 2.5, 1.0), (6, 0.005, 0.3)):
        mine = took_s[label == tool]
        assert np.median(mine) == pytest.approx(median_s, rel=0.12)
        assert np.log(mine).std() == pytest.approx(sigma, rel=0.1)
        assert known_s[label == tool] == pytest.approx(median_s * np.exp(sigma**2 / 2))
    rounds = np.array([(job.label == 0).sum() for job in jobs])
    assert (rounds == 1).mean() == pytest.approx(0.7, abs=4 * 0.46 / np.sqrt(len(jobs)))
    per_round = calls.sum() / rounds.sum()
    assert per_round == pytest.approx(3.0, rel=0.05)
