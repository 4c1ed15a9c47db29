"""What an engine reports about itself, under its own names."""

from __future__ import annotations

import math

from servegym.engines import EngineName
from servegym.serve.engine.metric_names import NAMES
from servegym.serve.engine.replica import Replica
from servegym.serve.engine.request import EngineRequest
from servegym.serve.monitoring.prometheus import Exposition, Histogram

#: What the counters count.
_COUNTERS = {
    "num_preemptions": "Preemptions.",
    "prefix_cache_queries": "Tokens looked up.",
    "prefix_cache_hits": "Tokens found.",
    "prompt_tokens": "Prompt tokens computed or found.",
    "prompt_tokens_cached": "Prompt tokens found in the cache.",
    "generation_tokens": "Output tokens.",
    "requests": "Requests that ended with an answer.",
    "aborted": "Requests whose clients went away.",
}


class EngineMetrics:
    """Counts what happens in a replica; times are real seconds.

    Args:
        model_name: Label of every sample.
        speed: Seconds of the replica's clock in one real second.
        engine: Whose names the page has.
    """

    def __init__(self, model_name: str, speed: float, engine: EngineName = "vllm") -> None:
        self._names = NAMES[engine]
        self._labels = {"model_name": model_name, **self._names.labels}
        self._speed = speed
        self._histograms = {key: Histogram(h.bounds) for key, h in self._names.histograms.items()}
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
        self._time("queue", now_s - request.arrival_s)

    def preempted(self, request: EngineRequest, now_s: float) -> None:
        """Count one more preempted request."""
        self._num_preemptions += 1

    def emitted(self, request: EngineRequest, now_s: float) -> None:
        """Count the token at the end of a prefill."""
        self._generation_tokens += 1
        if math.isnan(request.first_token_s):
            self._prompt_tokens += request.prompt_tokens
            self._time("ttft", now_s - request.arrival_s)
            self._time("prefill", now_s - request.first_scheduled_s)
        else:
            self._time("itl", now_s - request.last_token_s)

    def finished(self, request: EngineRequest, now_s: float) -> None:
        """Count the end of a request."""
        decode_s = now_s - request.first_token_s
        self._time("e2e", now_s - request.arrival_s)
        self._time("decode", decode_s)
        if request.output_tokens > 1:
            self._time("tpot", decode_s / (request.output_tokens - 1))
        self._ended[request.finish_reason] += 1

    def aborted(self) -> None:
        """Count a request whose client went away."""
        self._ended["abort"] += 1

    def decoded(self, gap_s: float, count: int) -> None:
        """Count tokens of decoding requests."""
        if count:
            self._generation_tokens += count
            self._time("itl", gap_s, count)

    def _time(self, key: str, duration_s: float, count: int = 1) -> None:
        histogram = self._histograms.get(key)
        if histogram is not None:  # not every engine reports it
            histogram.observe(duration_s / self._speed, count)

    def page(self, replica: Replica, lateness_s: Histogram) -> str:
        """Return the metrics as Prometheus reads them."""
        names = self._names
        out = Exposition(self._labels)
        out.gauge(names.running, "Requests in the batch.", replica.num_running)
        out.gauge(names.waiting, "Requests in the queue.", replica.num_waiting)
        out.gauge(names.usage, "KV blocks in use, 1 is all.", replica.kv_usage)
        if names.cache_config:
            out.gauge(
                names.cache_config,
                "Settings of the KV cache.",
                1,
                block_size=str(replica.block_size),
                num_gpu_blocks=str(replica.kind.num_blocks),
                enable_prefix_caching=str(replica.prefix_caching),
            )
        num_blocks = replica.kind.num_blocks
        sizes = {
            "tokens": num_blocks * replica.block_size,
            "blocks": num_blocks,
            "free_blocks": replica.num_free_blocks,
            "used_blocks": num_blocks - replica.num_free_blocks,
            "tokens_per_block": replica.block_size,
        }
        for key, name in names.sizes.items():
            out.gauge(name, "Size of the KV cache, or of a part of it.", sizes[key])
        counts = {
            "num_preemptions": self._num_preemptions,
            "prefix_cache_queries": self._scheduled_prompts,
            "prefix_cache_hits": self._cached_tokens,
            "prompt_tokens": self._prompt_tokens,
            "prompt_tokens_cached": self._cached_tokens,
            "generation_tokens": self._generation_tokens,
            "requests": self._ended["stop"] + self._ended["length"],
            "aborted": self._ended["abort"],
        }
        for key, name in names.counters.items():
            out.counter(name, _COUNTERS[key], [({}, counts[key])])
        if names.ended:
            out.counter(
                names.ended,
                "Requests that ended.",
                [({"finished_reason": reason}, n) for reason, n in self._ended.items()],
            )
        for key, histogram in names.histograms.items():
            out.histogram(histogram.name, histogram.text, self._histograms[key])
        out.histogram(
            "servegym:step_lateness_seconds", "Real time that steps were done late.", lateness_s
        )
        return out.page()
