"""What an engine reports about itself, under vLLM's names (those of version 0.32)."""

from __future__ import annotations

import math

from servegym.serve.engine.replica import Replica
from servegym.serve.engine.request import EngineRequest
from servegym.serve.prometheus import Exposition, Histogram

#: Bounds of vLLM's histograms, seconds.
TTFT_BOUNDS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_BOUNDS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BOUNDS_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("Time to first token.", TTFT_BOUNDS_S),
    "inter_token_latency_seconds": ("Time between two tokens.", TOKEN_BOUNDS_S),
    "request_time_per_output_token_seconds": (
        "Mean time between the tokens of a request.",
        TOKEN_BOUNDS_S,
    ),
    "e2e_request_latency_seconds": ("Time from arrival to end.", REQUEST_BOUNDS_S),
    "request_queue_time_seconds": ("Time in the waiting queue.", REQUEST_BOUNDS_S),
    "request_prefill_time_seconds": ("Time from admission to first token.", REQUEST_BOUNDS_S),
    "request_decode_time_seconds": ("Time from first to last token.", REQUEST_BOUNDS_S),
}


class EngineMetrics:
    """Counts what happens in a replica; times are real seconds.

    Args:
        model_name: Label of every sample.
        speed: Seconds of the replica's clock in one real second.
    """

    def __init__(self, model_name: str, speed: float) -> None:
        self._labels = {"model_name": model_name, "engine": "0"}
        self._speed = speed
        self._histograms = {name: Histogram(bounds) for name, (_, bounds) in _HISTOGRAMS.items()}
        self._num_preemptions = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._scheduled_prompts = 0
        self._generation_tokens = 0
        self._ended = {"stop": 0, "length": 0, "abort": 0}

    def admitted(self, request: EngineRequest, now_s: float) -> None:
        """Count prefix-cache queries and hits, both in tokens."""
        self._scheduled_prompts += request.prompt_tokens
        self._cached_tokens += request.cached_tokens
        self._time("request_queue_time_seconds", now_s - request.arrival_s)

    def preempted(self, request: EngineRequest, now_s: float) -> None:
        """Count a preemption."""
        self._num_preemptions += 1

    def emitted(self, request: EngineRequest, now_s: float) -> None:
        """Count the token at the end of a prefill."""
        self._generation_tokens += 1
        if math.isnan(request.first_token_s):
            self._prompt_tokens += request.prompt_tokens
            self._time("time_to_first_token_seconds", now_s - request.arrival_s)
            self._time("request_prefill_time_seconds", now_s - request.first_scheduled_s)
        else:
            self._time("inter_token_latency_seconds", now_s - request.last_token_s)

    def finished(self, request: EngineRequest, now_s: float) -> None:
        """Count the end of a request."""
        decode_s = now_s - request.first_token_s
        self._time("e2e_request_latency_seconds", now_s - request.arrival_s)
        self._time("request_decode_time_seconds", decode_s)
        if request.output_tokens > 1:
            self._time(
                "request_time_per_output_token_seconds", decode_s / (request.output_tokens - 1)
            )
        self._ended[request.finish_reason] += 1

    def aborted(self) -> None:
        """Count a request whose client went away."""
        self._ended["abort"] += 1

    def stepped(self, begin_s: float, end_s: float, num_decodes: int, prefill_tokens: int) -> None:
        """Count the tokens of a step's decoding requests."""
        if num_decodes:
            self._generation_tokens += num_decodes
            self._time("inter_token_latency_seconds", end_s - begin_s, num_decodes)

    def _time(self, name: str, duration_s: float, count: int = 1) -> None:
        self._histograms[name].observe(duration_s / self._speed, count)

    def page(self, replica: Replica, lateness_s: Histogram) -> str:
        """Return the metrics as Prometheus reads them."""
        out = Exposition(self._labels)
        out.gauge("vllm:num_requests_running", "Requests in the batch.", replica.num_running)
        out.gauge("vllm:num_requests_waiting", "Requests in the queue.", replica.num_waiting)
        out.gauge("vllm:kv_cache_usage_perc", "KV blocks in use, 1 is all.", replica.pool.usage)
        out.gauge(
            "vllm:cache_config_info",
            "Settings of the KV cache.",
            1,
            block_size=str(replica.block_size),
            num_gpu_blocks=str(replica.kind.num_blocks),
            enable_prefix_caching=str(replica.pool.caching),
        )
        for name, text, value in (
            ("num_preemptions", "Preemptions.", self._num_preemptions),
            ("prefix_cache_queries", "Tokens looked up.", self._scheduled_prompts),
            ("prefix_cache_hits", "Tokens found.", self._cached_tokens),
            ("prompt_tokens", "Prompt tokens computed or found.", self._prompt_tokens),
            ("prompt_tokens_cached", "Prompt tokens found in the cache.", self._cached_tokens),
            ("generation_tokens", "Output tokens.", self._generation_tokens),
        ):
            out.counter(f"vllm:{name}", text, [({}, value)])
        out.counter(
            "vllm:request_success",
            "Requests that ended.",
            [({"finished_reason": reason}, n) for reason, n in self._ended.items()],
        )
        for name, (text, _) in _HISTOGRAMS.items():
            out.histogram(f"vllm:{name}", text, self._histograms[name])
        out.histogram(
            "servegym:step_lateness_seconds", "Real time that steps were done late.", lateness_s
        )
        return out.page()
