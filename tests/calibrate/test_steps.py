"""Step logs as files, and vLLM's part that writes them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import servegym.calibrate
from servegym.calibrate.steps import read_steps
from servegym.errors import ConfigError

HEADER = "prefill_tokens,decode_sequences,kv_tokens,duration_s"


def read(tmp_path, text):
    path = tmp_path / "steps.csv"
    path.write_text(text, encoding="utf-8")
    return read_steps(path)


def test_a_log_is_read(tmp_path):
    steps = read(tmp_path, f"{HEADER},prefill_pairs\n4,2,30,0.5,18\n0,3,33,0.25,0\n")
    assert steps.prefill_tokens.tolist() == [4, 0]
    assert steps.duration_s.tolist() == [0.5, 0.25]
    # 18 pairs of 4 tokens: 10 among themselves, so 2 cached ones before each
    assert steps.prefill_context.tolist() == [2, 0]


def test_marks_and_line_ends_of_all_systems_do_not_count(tmp_path):
    steps = read(tmp_path, f"\ufeff{HEADER}\r\n4,2,30,0.5\r0,3,33,0.25\n")
    assert steps.kv_tokens.tolist() == [30, 33]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "has no column prefill_tokens"),
        (f"{HEADER}\n", "holds no steps"),
        (f"{HEADER}\n1,2,3,fast\n", "line 2: duration_s must be a number above 0, got 'fast'"),
        (f"{HEADER}\n1,2,3,1\n-1,2,3,1\n", "line 3: prefill_tokens must be a number from 0"),
        (f"{HEADER}\n1,2,3\n", "line 2: 3 fields, but the header has 4 columns"),
        (f"{HEADER}\n1,2,3,456,1\n", "line 2: 5 fields, but the header has 4 columns"),
        (f'{HEADER}\n1,2,"3,456",1\n', "line 2: kv_tokens must be a number from 0, got '3,456'"),
        (f"{HEADER}\n1,2,3_456,1\n", "line 2: kv_tokens must be a number from 0, got '3_456'"),
        (f"{HEADER},kv_tokens\n1,2,3,1,9\n", "has 2 columns 'kv_tokens'"),
    ],
)
def test_a_wrong_log_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)


class FakeScheduler:
    """As much of vLLM's scheduler as its subclass needs."""

    def __init__(self, vllm_config):
        self.requests = {}
        self.steps = []

    def schedule(self):
        return self.steps.pop(0)

    def update_from_output(self, scheduler_output):
        return "outputs"

    def shutdown(self):
        pass


@pytest.fixture
def plugin(monkeypatch):
    """Vllm's part, loaded beside a vLLM of the given version."""

    def load(version):
        for name in ("vllm", "vllm.v1", "vllm.v1.core", "vllm.v1.core.sched"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["vllm"].__version__ = version
        name = "vllm.v1.core.sched.async_scheduler"
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules[name].AsyncScheduler = FakeScheduler
        path = Path(servegym.calibrate.__file__).with_name("vllm_step_log.py")
        spec = importlib.util.spec_from_file_location("vllm_step_log", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def step(new, cached, counts):
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=r, num_computed_tokens=n) for r, n in new],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[r for r, _ in cached], num_computed_tokens=[n for _, n in cached]
        ),
        num_scheduled_tokens=counts,
    )


def test_an_unknown_version_of_vllm_is_refused(plugin):
    module = plugin("0.99.1")
    with pytest.raises(ImportError, match=r"knows vLLM 0\.32\.x, this is 0\.99\.1"):
        module.__getattr__("StepLogScheduler")


def test_a_log_without_a_file_is_refused(plugin):
    scheduler = plugin("0.32.0").StepLogScheduler
    with pytest.raises(ValueError, match="--additional-config"):
        scheduler(SimpleNamespace(additional_config={}))


def test_steps_are_split_into_prompts_and_decodes(plugin):
    row = plugin("0.32.0").step_row
    # a chunk of 4 of 10 tokens over 2 cached ones: pairs 4 * 2 + 10
    assert row([(4, 2, 10)]) == (4, 0, 0, 18)
    # a decode of the 10th token; the last token of a prompt that a prefix covers decodes as well
    assert row([(1, 9, 10), (1, 9, 9)]) == (0, 2, 20, 0)
    # a prompt of one token is a prompt
    assert row([(1, 0, 1)]) == (1, 0, 0, 1)


def test_the_scheduler_writes_what_each_step_computed(plugin, tmp_path, monkeypatch):
    module = plugin("0.32.0")
    clock = iter([10.0, 11.0, 10.5, 13.0])  # the second step is scheduled while the first runs
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    path = tmp_path / "steps.csv"
    engine = module.StepLogScheduler(SimpleNamespace(additional_config={"step_log": str(path)}))
    engine.requests = {
        "a": SimpleNamespace(num_computed_tokens=9, num_tokens=10),
        "b": SimpleNamespace(num_computed_tokens=0, num_tokens=8),
    }
    engine.steps = [step([("b", 4)], [("a", 9)], {"a": 1, "b": 4}), step([], [("a", 10)], {"a": 1})]
    first = engine.schedule()
    assert engine.update_from_output(first) == "outputs"
    engine.update_from_output(engine.schedule())
    engine.shutdown()
    steps = read_steps(path)
    assert steps.prefill_tokens.tolist() == [4, 0]
    assert steps.decode_sequences.tolist() == [1, 1]
    assert steps.kv_tokens.tolist() == [10, 11]
    assert steps.prefill_pairs.tolist() == [4 * 4 + 10, 0]
    assert steps.duration_s.tolist() == [1.0, 2.0]
