"""What holds for the jobs of every family."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from pydantic import BaseModel

from servegym.errors import ConfigError
from servegym.workflow.job import StageKind
from servegym.workflow.workloads.registry import WORKLOADS, WorkloadConfig, draw, workload

LLM_FAMILIES = [
    *("text-to-sql", "map-reduce", "best-of-n"),
    *("tree-search", "planner-executor", "coding-agent"),
]


def ancestors(job, keep):
    """Bit sets of the stages before each one, along stages of `keep` alone."""
    before = [0] * job.num_stages
    for u, v in sorted(
        zip(job.parent.tolist(), job.child.tolist(), strict=True), key=lambda e: e[1]
    ):
        if keep[u] and keep[v]:
            before[v] |= before[u] | 1 << u
    return before


def test_parents_come_first_and_no_edge_occurs_twice(family_jobs):
    assert family_jobs[1]
    for job in family_jobs[1]:
        assert (job.parent < job.child).all()
        edges = set(zip(job.parent.tolist(), job.child.tolist(), strict=True))
        assert len(edges) == job.num_edges


def test_labels_name_steps_of_one_kind(family_jobs):
    name, jobs = family_jobs
    labels = WORKLOADS[name].labels
    kinds: dict[int, set[int]] = {}
    for job in jobs:
        for label, kind in zip(job.label.tolist(), job.kind.tolist(), strict=True):
            kinds.setdefault(label, set()).add(kind)
    assert all(len(found) == 1 for found in kinds.values())
    assert not labels or set(kinds) <= set(range(len(labels)))


def test_every_step_occurs(family_jobs):
    name, jobs = family_jobs
    seen = {label for job in jobs for label in job.label.tolist()}
    rare = {"sub-agent call", "sub-agent tool"}
    assert {step for i, step in enumerate(WORKLOADS[name].labels) if i not in seen} <= rare


def test_first_stages_are_known_and_hidden_ones_wait_for_something(family_jobs):
    assert family_jobs[1]
    for job in family_jobs[1]:
        entries = np.ones(job.num_stages, bool)
        entries[job.child] = False
        assert entries.any()
        assert not (entries & job.hidden).any()


def test_order_of_known_stages_is_known_without_the_hidden_ones(family_jobs):
    assert family_jobs[1]
    for job in family_jobs[1]:
        known = ~job.hidden
        only_known = sum(1 << i for i in np.flatnonzero(known).tolist())
        full, seen = ancestors(job, np.ones(job.num_stages, bool)), ancestors(job, known)
        for v in np.flatnonzero(known).tolist():
            assert full[v] & only_known == seen[v]


def test_shared_tokens_are_of_the_parents_prompt_or_output(family_jobs):
    assert family_jobs[1]
    for job in family_jobs[1]:
        shares = job.shared_tokens > 0
        parent, child = job.parent[shares], job.child[shares]
        assert (job.kind[parent] == StageKind.LLM).all()
        assert (job.kind[child] == StageKind.LLM).all()
        assert (job.shared_tokens[shares] <= job.prompt_tokens[child]).all()
        whole = job.prompt_tokens[parent] + job.output_tokens[parent]
        assert (job.shared_tokens[shares] <= whole).all()
        assert (job.shared_tokens[shares] >= 0).all()


def test_each_kind_has_its_numbers_and_no_others(family_jobs):
    assert family_jobs[1]
    for job in family_jobs[1]:
        llm, tool = job.kind == StageKind.LLM, job.kind == StageKind.TOOL
        assert ((job.prompt_tokens > 0) == llm).all()
        assert ((job.output_tokens > 0) == llm).all()
        assert (job.expected_output_tokens[llm] >= 1).all()
        assert not job.tool_s[~tool].any()
        assert not job.expected_tool_s[~tool].any()
        task = job.kind == StageKind.TASK
        assert not job.duration_s[~task].any()
        assert (np.isfinite(job.duration_s[task]) & (job.duration_s[task] >= 0)).any(1).all()
        assert np.isfinite(job.data_bytes).all()


def test_same_seed_draws_the_same_jobs_and_another_seed_others(family_jobs, records_folder):
    name, _ = family_jobs
    params = {"num_sequences": 8, "num_shards": 2} if name == "post-training" else {}
    if name == "wfcommons":
        params = {"path": str(records_folder)}
    first, again, other = (
        draw(name, np.random.default_rng(seed), 4, **params) for seed in (7, 7, 8)
    )
    same = []
    for a, b, c in zip(first, again, other, strict=True):
        for field in dataclasses.fields(a):
            x, y, z = (getattr(job, field.name) for job in (a, b, c))
            assert np.array_equal(x, y), field.name
            same.append(np.array_equal(x, z))
    assert name == "wfcommons" or not all(same)


@pytest.mark.parametrize("name", LLM_FAMILIES)
def test_expected_output_is_the_mean_of_its_step(name):
    jobs = draw(name, np.random.default_rng(1), 600)
    label, true, expected = (
        np.concatenate([getattr(job, key)[job.kind == StageKind.LLM] for job in jobs])
        for key in ("label", "output_tokens", "expected_output_tokens")
    )
    assert len(label)
    for step in np.unique(label):
        mine = label == step
        assert len(set(expected[mine].tolist())) == 1
        # four standard errors, and rounding to whole tokens
        error = 4 * true[mine].std() / np.sqrt(mine.sum()) + 0.5
        assert abs(true[mine].mean() - expected[mine][0]) < error, WORKLOADS[name].labels[step]


@pytest.mark.parametrize("name", LLM_FAMILIES)
def test_predicted_lengths_have_the_error_asked_for(name):
    jobs = draw(name, np.random.default_rng(2), 200, prediction_sigma=0.5)
    ratio = np.concatenate(
        [
            (job.expected_output_tokens / np.maximum(job.output_tokens, 1))[job.output_tokens > 30]
            for job in jobs
        ]
    )
    assert abs(np.log(ratio).mean()) < 4 * 0.5 / np.sqrt(len(ratio))
    assert np.log(ratio).std() == pytest.approx(0.5, rel=0.1)


def test_configuration_names_a_family_by_its_kind():
    class File(BaseModel):
        workload: WorkloadConfig

    file = File.model_validate({"workload": {"kind": "best-of-n", "n": 3}})
    assert file.workload == workload("best-of-n", n=3)
    assert {WORKLOADS[name].model_fields["kind"].default for name in WORKLOADS} == set(WORKLOADS)


@pytest.mark.parametrize(
    ("name", "params", "sentence"),
    [
        ("text2sql", {}, "unknown workload 'text2sql': .*did you mean text-to-sql"),
        ("best-of-n", {"num": 2}, "unknown parameter of best-of-n 'num': choose one of answer, n"),
        ("best-of-n", {"n": 0}, r"best-of-n\.n: input should be greater than or equal to 1"),
        ("text-to-sql", {"deadline_scales": (1.0,)}, "need one number a class"),
        ("wfcommons", {"path": "x", "speeds": (1.0,)}, "need one entry a type"),
        ("wfcommons", {}, r"wfcommons\.path: field required"),
        ("random-dag", {"ccr": -1}, r"random-dag\.ccr: input should be greater"),
        ("coding-agent", {"tool": {"medians_s": (1.0,), "sigmas": ()}}, "one number a part"),
    ],
)
def test_wrong_parameter_is_named(name, params, sentence):
    with pytest.raises(ConfigError, match=sentence):
        workload(name, **params)


def test_number_of_jobs_is_checked():
    with pytest.raises(ConfigError, match="num_jobs must be at least 1, got 0"):
        draw("best-of-n", np.random.default_rng(0), 0)
