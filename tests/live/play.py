"""Play requests on the real vLLM, and check every decision of its scheduler against the policy.

    python play.py MODEL ORDER OUT [--overhead]

Runs inside vLLM's environment. ORDER is `stock` for vLLM's own FCFS without the plug-in,
`scripted` for an arbitrary order made up here, or what the plug-in takes for a policy. Writes every
request's tokens and, but for `stock`, what was checked.

The order is computed a second time, here, from the requests themselves and with nothing kept from
step to step; at each preemption the victim must be the one with the highest score of all that are
running at that moment, and nobody admitted may score higher than one left waiting.

With --overhead nothing is checked; instead 100 requests are kept waiting while 32 run, in steps of
10 ms that compute nothing, and the plug-in's time for each step is what it is without company.
"""

from __future__ import annotations

import json
import sys
import time as wall
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.llm_engine import LLMEngine
from workload import Drawn, draw

import servegym.serve.vllm as servegym_vllm
from servegym.costs.grid import (
    NUM_BATCH_KNOTS,
    NUM_CHUNK_KNOTS,
    NUM_CONTEXT_KNOTS,
    NUM_DENSE_KNOTS,
    NUM_KV_KNOTS,
    CostGrid,
)
from servegym.policy.ordering import NO_LIMIT_S, NUM_ORDERING_FEATURES, OrderingPolicy
from servegym.serve.vllm import plugin as plugin_module
from servegym.serve.vllm import scheduler as scheduler_module
from servegym.serve.vllm.grid_file import save_grid
from servegym.serve.vllm.hints import PREDICTED_OUTPUT_TOKENS, TTFT_SLO_S

NUM_REQUESTS = 240
REQUESTS_PER_STEP = 1.0
BLOCK_SIZE = 32
NUM_BLOCKS = 60
MAX_NUM_SEQS = 32
BUDGET = 256


class Scripted:
    """Orders by a hash of the features: no two steps alike, and nothing sensible about it."""

    name = "scripted"
    information = "blind"
    memory_size = 0

    def __init__(self) -> None:
        self.factors = np.random.default_rng(0).uniform(1e3, 1e4, NUM_ORDERING_FEATURES)

    def score(self, features: Any, memory: Any) -> Any:
        return np.modf(np.abs(features @ self.factors))[0]


class FrozenClock:
    """Stands in for the module `time`: the plug-in and the check must see the same moment."""

    monotonic = staticmethod(wall.monotonic)
    perf_counter_ns = staticmethod(wall.perf_counter_ns)

    def __init__(self) -> None:
        self.now_s = wall.time()

    def time(self) -> float:
        return self.now_s


@dataclass
class Checked:
    """What was checked, and what went wrong."""

    preemptions: int = 0
    preemptions_unlike_fcfs: int = 0
    admissions: int = 0
    admissions_unlike_fcfs: int = 0
    max_waiting: int = 0
    wrong: list[str] = field(default_factory=list)


class Check:
    """Sits between the plug-in and vLLM's `schedule`, and around its preemptions."""

    def __init__(self, scheduler: Any, policy: OrderingPolicy, clock: FrozenClock) -> None:
        self.scheduler = scheduler
        self.policy = policy
        self.clock = clock
        self.told = Checked()
        self.score: dict[str, float] = {}
        self.idle_since_s: dict[str, float] = {}
        self.preemptions: dict[str, int] = {}
        self.priority: dict[str, int] = {}
        self._before = scheduler.plugin.before
        self._schedule = scheduler.schedule
        self._preempt = scheduler._preempt_request
        scheduler.plugin.before = self.before
        scheduler.schedule = self.schedule
        scheduler._preempt_request = self.preempt

    def row(self, request: Any, running: bool) -> list[float]:
        """Features of one request, in the order of `policy.ordering`."""
        name, now_s = request.request_id, self.clock.now_s
        if request.num_preemptions != self.preemptions.get(name, 0):
            self.preemptions[name] = request.num_preemptions
            self.idle_since_s[name] = now_s
        told = request.sampling_params.extra_args
        generated = len(request.output_token_ids)
        due_s = request.arrival_time + told[TTFT_SLO_S] - now_s
        idle_s = now_s - self.idle_since_s.get(name, request.arrival_time)
        return [
            float(running),
            request.num_computed_tokens,
            generated,
            -(-request.num_computed_tokens // BLOCK_SIZE),
            self.priority[name],
            len(request.prompt_token_ids),
            max(min(told[PREDICTED_OUTPUT_TOKENS], request.max_tokens) - generated, 1),
            now_s - request.arrival_time,
            0.0 if running else idle_s,
            request.num_preemptions,
            NO_LIMIT_S if generated else due_s,
            NO_LIMIT_S,
            len(self.scheduler.running),
            len(self.scheduler.waiting),
            self.scheduler.kv_cache_manager.usage,
            self.scheduler.plugin._orderer._step_s,
            BUDGET,
        ]

    def before(self, *args: Any, may_decide: bool) -> None:
        """Let the plug-in order, then compute every score anew."""
        waiting, running = list(self.scheduler.waiting), list(self.scheduler.running)
        self.clock.now_s = wall.time()
        self._before(*args, may_decide=may_decide)
        requests = [*waiting, *running]
        # scores of a step in which nothing could be decided are not there to be looked up
        self.score = {}
        if may_decide:
            rows = [self.row(r, i >= len(waiting)) for i, r in enumerate(requests)]
            scores = self.policy.score(np.array(rows), np.zeros((len(rows), 0))).tolist()
            self.score = dict(zip([r.request_id for r in requests], scores, strict=True))

    def preempt(self, request: Any, *args: Any, **kwargs: Any) -> None:
        """Compare a victim with all that are running."""
        there = [*self.scheduler.running, request]
        self.told.preemptions += 1
        latest = max(there, key=lambda r: r.arrival_time)
        self.told.preemptions_unlike_fcfs += request is not latest
        worst = max(self.score[r.request_id] for r in there)
        if self.score[request.request_id] < worst:
            self.told.wrong.append(f"{request.request_id} was preempted, not the worst")
        self._preempt(request, *args, **kwargs)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Compare those admitted with those left waiting."""
        waiting = {r.request_id: r.arrival_time for r in self.scheduler.waiting}
        self.told.max_waiting = max(self.told.max_waiting, len(waiting))
        output = self._schedule(*args, **kwargs)
        admitted = [name for name in waiting if name in output.num_scheduled_tokens]
        # one whose last token is still on its way from the step before is passed over
        left = [
            name
            for name in waiting
            if name not in output.num_scheduled_tokens
            and not self.scheduler.requests[name].num_stale_output_tokens
        ]
        if admitted and left:
            self.told.admissions += len(admitted)
            earliest = sorted(waiting, key=waiting.__getitem__)[: len(admitted)]
            self.told.admissions_unlike_fcfs += len({*admitted} - {*earliest})
            best = min(self.score[name] for name in left)
            for name in admitted:
                if self.score[name] > best:
                    self.told.wrong.append(f"{name} was admitted before a better one")
        return output


def engine_args(model: str, order: str, grid: Path | None) -> EngineArgs:
    """Arguments of an engine short of KV blocks, or of one whose steps a grid times."""
    ours: dict[str, Any] = {}
    if order != "stock":
        ours = {
            "scheduling_policy": "priority",
            "scheduler_cls": servegym_vllm.PolicySyncScheduler,
            "additional_config": {"servegym": {"policy": order}},
        }
    if grid is not None:
        ours["distributed_executor_backend"] = servegym_vllm.PacedExecutor
        ours["additional_config"]["servegym_paced"] = {"grid": str(grid)}
    return EngineArgs(
        model=model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=BUDGET,
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=NUM_BLOCKS if grid is None else 32 * MAX_NUM_SEQS,
        enable_prefix_caching=False,
        async_scheduling=False,
        seed=0,
        **ours,
    )


def add(engine: LLMEngine, name: str, drawn: Drawn, priority: int) -> None:
    """Hand a request to the engine."""
    params = SamplingParams(
        temperature=0.0,
        max_tokens=drawn.output_tokens,
        ignore_eos=True,
        extra_args={
            PREDICTED_OUTPUT_TOKENS: drawn.predicted_tokens,
            TTFT_SLO_S: drawn.ttft_slo_s,
        },
    )
    engine.add_request(name, {"prompt_token_ids": drawn.prompt}, params, priority=priority)


def play(engine: LLMEngine, requests: list[Drawn], check: Check | None) -> dict[str, Any]:
    """Play all requests; return their tokens and latencies in steps."""
    tokens: dict[str, list[int]] = {}
    steps: dict[str, list[int]] = {}
    step_s: list[float] = []
    arrived = step = 0
    while arrived < len(requests) or engine.has_unfinished_requests():
        while arrived < len(requests) and requests[arrived].step <= step:
            drawn = requests[arrived]
            add(engine, str(arrived), drawn, 0 if check is None else drawn.priority)
            if check is not None:
                # vLLM appends something random to the name
                (inner,) = set(check.scheduler.requests) - set(check.priority)
                check.priority[inner] = drawn.priority
            steps[str(arrived)] = [step, 0, 0]
            arrived += 1
        begin_s = wall.perf_counter()
        outputs = engine.step() if engine.has_unfinished_requests() else []
        if outputs:
            step_s.append(wall.perf_counter() - begin_s)
        step += 1
        for output in outputs:
            told = steps[output.request_id]
            told[1] = told[1] or step
            if output.finished:
                told[2] = step
                tokens[output.request_id] = list(output.outputs[0].token_ids)
    return {
        "tokens": tokens,
        "mean_e2e_steps": float(np.mean([end - begin for begin, _, end in steps.values()])),
        "mean_ttft_steps": float(np.mean([first - begin for begin, first, _ in steps.values()])),
        "num_steps": step,
        "step_p50_ms": float(np.median(step_s)) * 1e3,
        "compute_s": float(np.sum(step_s)),
    }


def keep_full(engine: LLMEngine, requests: list[Drawn], in_system: int) -> None:
    """Play with a new request for each that ends, so that equally many are always there."""
    arrived = ended = 0
    while ended < len(requests) - in_system:
        while arrived - ended < in_system:
            add(engine, str(arrived), requests[arrived], 0)
            arrived += 1
        ended += sum(output.finished for output in engine.step())


def ten_ms(folder: Path) -> Path:
    """Write the cost of steps that all take 10 ms."""

    def axis(size: int) -> Any:
        return np.arange(1.0, size + 1)

    grid = CostGrid(
        cpu_s=0.01,
        dense_tokens=axis(NUM_DENSE_KNOTS),
        dense_s=np.zeros(NUM_DENSE_KNOTS),
        prefill_chunk=axis(NUM_CHUNK_KNOTS),
        prefill_context=axis(NUM_CONTEXT_KNOTS),
        prefill_s=np.zeros((NUM_CHUNK_KNOTS, NUM_CONTEXT_KNOTS)),
        decode_batch=axis(NUM_BATCH_KNOTS),
        decode_kv=axis(NUM_KV_KNOTS),
        decode_s=np.zeros((NUM_BATCH_KNOTS, NUM_KV_KNOTS)),
    )
    path = folder / "ten-ms.npz"
    save_grid(grid, path)
    return path


def make_engine(
    model: str, order: str, grid: Path | None
) -> tuple[LLMEngine, OrderingPolicy | None]:
    """Make an engine, and the order once more."""
    again = None
    if order == "scripted":
        again = Scripted()
        scheduler_module.load_policy = lambda text: again
    elif order != "stock":
        again = plugin_module.load_policy(order)
    return LLMEngine.from_engine_args(engine_args(model, order, grid)), again


def main() -> None:
    """Play, check, write."""
    model, order, out, *rest = sys.argv[1:]
    if rest == ["--overhead"]:
        engine, _ = make_engine(model, order, ten_ms(Path(out).parent))
        scheduler = engine.engine_core.engine_core.scheduler
        keep_full(engine, draw(600, 1.0, 1024, seed=5), in_system=100 + MAX_NUM_SEQS)
        told = scheduler.plugin.statistics()
        Path(out).write_text(json.dumps(told))
        return
    engine, again = make_engine(model, order, None)
    scheduler = engine.engine_core.engine_core.scheduler
    check = None
    if again is not None:
        plugin_module.time = clock = FrozenClock()
        check = Check(scheduler, again, clock)
    told = play(engine, draw(NUM_REQUESTS, REQUESTS_PER_STEP, 1024, seed=9), check)
    if check is not None:
        told["checked"] = vars(check.told)
        told["plugin"] = scheduler.plugin.statistics()
    told["left"] = len(scheduler.requests)
    Path(out).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
