"""Steps that take as long as a cost model says."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import servegym.serve.vllm
from servegym.errors import ConfigError
from servegym.serve.vllm.grid_file import load_grid, save_grid
from servegym.serve.vllm.paced_executor import make_executor
from servegym.serve.vllm.pacing import Pacer, StepReader, read_paced_config

from ...toys import linear_grid  # noqa: TID252 - tests are no package

VOCABULARY = 100


@pytest.fixture
def grid():
    """1 s a step, 0.1 s a token, and in decodes 0.001 s a cached token: easy to tell apart."""
    return linear_grid(pair_s=0.0)


def output(scheduled, new=(), cached=(), finished=()):
    """As vLLM's `SchedulerOutput`; cached requests are (name, computed, generated)."""
    return SimpleNamespace(
        num_scheduled_tokens=scheduled,
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, num_computed_tokens=hit, prompt_token_ids=[0] * prompt)
            for name, hit, prompt in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[name for name, _, _ in cached],
            num_computed_tokens=[computed for _, computed, _ in cached],
            num_output_tokens=[generated for _, _, generated in cached],
        ),
        finished_req_ids=set(finished),
        total_num_scheduled_tokens=sum(scheduled.values()),
    )


def test_a_prompt_in_chunks_gets_its_first_token_with_the_last(grid):
    reader = StepReader(grid, VOCABULARY)
    step = reader.read(output({"a": 8}, new=[("a", 0, 12)]))
    assert step.duration_s == pytest.approx(1.8)
    assert (step.names, step.sampled) == (["a"], [[]])
    step = reader.read(output({"a": 4}, cached=[("a", 8, 0)]))
    # position 12, past the third of the vocabulary that is no text
    assert step.sampled == [[33 + 12]]
    step = reader.read(output({"a": 1}, cached=[("a", 12, 1)]))
    assert step.duration_s == pytest.approx(1.1 + 0.013)
    assert step.sampled == [[33 + 13]]


def test_a_resumed_request_computes_all_it_had_and_goes_on(grid):
    reader = StepReader(grid, VOCABULARY)
    reader.read(output({"a": 5}, new=[("a", 0, 5)]))
    # three tokens were generated before it was preempted
    step = reader.read(output({"a": 6}, cached=[("a", 0, 3)]))
    assert step.sampled == [[]]
    step = reader.read(output({"a": 2}, cached=[("a", 6, 3)]))
    assert step.sampled == [[33 + 8]]
    assert step.duration_s == pytest.approx(1.2)


def test_a_request_that_found_all_but_one_token_cached_is_a_decode_to_the_engine(grid):
    reader = StepReader(grid, VOCABULARY)
    step = reader.read(output({"a": 1}, new=[("a", 7, 8)]))
    assert step.duration_s == pytest.approx(1.1 + 0.008)
    assert step.sampled == [[33 + 8]]


def test_tokens_stay_within_the_vocabulary(grid):
    reader = StepReader(grid, VOCABULARY)
    tokens = [reader._token(position) for position in range(500)]
    assert min(tokens) == 33
    assert max(tokens) == 99


def test_ended_requests_are_forgotten(grid):
    reader = StepReader(grid, VOCABULARY)
    reader.read(output({"a": 5}, new=[("a", 0, 5)]))
    step = reader.read(output({}, finished=["a"]))
    assert (step.duration_s, step.names, step.sampled) == (0.0, [], [])
    assert not reader._prompt_tokens


def test_steps_follow_each_other_and_lateness_does_not_add_up():
    now_s = [10.0]
    late_s = [0.0]

    def sleep(seconds):
        now_s[0] += seconds + late_s[0]

    pacer = Pacer(2.0, clock=lambda: now_s[0], sleep=sleep)
    assert pacer.begin(0.5) == 11.0
    # formed while the first one runs
    assert pacer.begin(0.25) == 11.5
    late_s[0] = 0.125
    pacer.finish(11.0)
    assert now_s[0] == 11.125
    pacer.finish(11.5)
    assert now_s[0] == 11.625
    now_s[0] = 20.0
    assert pacer.begin(0.5) == 21.0
    now_s[0] = 22.0
    pacer.finish(21.0)
    assert pacer.lateness_s().tolist() == [0.125, 0.125, 1.0]


def test_a_cost_grid_survives_its_file(grid, tmp_path):
    save_grid(grid, tmp_path / "g.npz")
    again = load_grid(tmp_path / "g.npz")
    assert again.step_s([(5, 3)], 2, 40) == grid.step_s([(5, 3)], 2, 40)


def test_a_file_that_is_no_grid_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not a step cost of servegym"):
        load_grid(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ConfigError, match="is not a step cost of servegym"):
        load_grid(tmp_path / "other.npz")


@pytest.mark.parametrize(
    ("additional", "message"),
    [
        ({}, "tell the paced executor what a step costs"),
        ({"servegym_paced": {}}, "servegym_paced: grid: field required"),
        ({"servegym_paced": {"grid": "g", "time_scale": 0}}, "servegym_paced: time_scale"),
    ],
)
def test_wrong_settings_get_one_sentence(additional, message):
    with pytest.raises(ConfigError, match=message):
        read_paced_config(additional)


class FakeExecutor:
    """As much of vLLM's `Executor` as its subclass needs."""

    def __init__(self, vllm_config):
        self.vllm_config = vllm_config
        self.model_config = SimpleNamespace(get_vocab_size=lambda: VOCABULARY)
        self._init_executor()


@pytest.fixture
def paced(monkeypatch, grid, tmp_path):
    for name in ("", ".v1.executor.abstract", ".v1.kv_cache_interface", ".v1.outputs"):
        monkeypatch.setitem(sys.modules, f"vllm{name}", ModuleType(f"vllm{name}"))
    worker = ModuleType("vllm.v1.worker.worker_base")
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.worker_base", worker)
    sys.modules["vllm"].__version__ = "0.32.0"
    sys.modules["vllm.v1.executor.abstract"].Executor = FakeExecutor
    sys.modules["vllm.v1.kv_cache_interface"].FullAttentionSpec = SimpleNamespace
    sys.modules["vllm.v1.outputs"].ModelRunnerOutput = SimpleNamespace
    worker.record_kv_cache_layout = lambda config, name: None
    make_executor.cache_clear()
    save_grid(grid, tmp_path / "g.npz")
    config = {"grid": str(tmp_path / "g.npz"), "time_scale": 0.001}
    config["lateness_file"] = str(tmp_path / "late.npy")
    made = servegym.serve.vllm.PacedExecutor(
        SimpleNamespace(additional_config={"servegym_paced": config})
    )
    yield made
    make_executor.cache_clear()


def test_the_executor_answers_when_the_step_is_over(paced, tmp_path):
    step = output({"a": 5}, new=[("a", 0, 5)])
    # as vLLM does without overlap, and then with it
    assert paced.execute_model(step, non_block=True).result() is None
    told = paced.sample_tokens(None)
    assert (told.req_ids, told.req_id_to_index) == (["a"], {"a": 0})
    assert told.sampled_token_ids == [[33 + 5]]
    paced.execute_model(output({"a": 1}, cached=[("a", 5, 1)]), non_block=True)
    first = paced.sample_tokens(None, non_block=True)
    paced.execute_model(output({"a": 1}, cached=[("a", 6, 2)]), non_block=True)
    second = paced.sample_tokens(None, non_block=True)
    assert first.result().sampled_token_ids == [[33 + 6]]
    assert second.result().sampled_token_ids == [[33 + 7]]
    empty = paced.execute_model(output({}, finished=["a"]))
    assert empty.req_ids == []
    paced.shutdown()
    assert len(np.load(tmp_path / "late.npy")) == 3


def test_vllm_finds_the_executor_by_name(paced):
    made = type(paced)
    assert f"{made.__module__}.{made.__qualname__}" == "servegym.serve.vllm.PacedExecutor"
    assert made.supports_async_scheduling()
    assert paced.collective_rpc("anything") == [None]
