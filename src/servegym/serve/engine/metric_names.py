"""What each engine calls its metrics, and into which bins its histograms count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from servegym.engines import EngineName

#: Bounds of vLLM's histograms, seconds; TensorRT-LLM took them over, but for one.
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
_TRTLLM_PREFILL_BOUNDS_S = (
    *(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_SGLANG_TTFT_BOUNDS_S = (
    *(0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 20.0, 40.0, 60.0, 80.0),
    *(100.0, 200.0, 400.0),
)
_SGLANG_TOKEN_BOUNDS_S = (
    *(0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.06, 0.08, 0.1),
    *(0.2, 0.4, 0.6, 0.8, 1.0, 2.0, 4.0, 6.0, 8.0),
)


@dataclass(frozen=True)
class HistogramNames:
    """A histogram of times.

    Attributes:
        name: As the page has it.
        text: What it counts.
        bounds: Of its bins, seconds.
    """

    name: str
    text: str
    bounds: tuple[float, ...]


@dataclass(frozen=True)
class PageNames:
    """What the series on an engine's metrics page are called.

    Attributes:
        labels: Of every sample, besides the model's name.
        running: Gauge of requests in the batch.
        waiting: Gauge of requests in the queue.
        usage: Gauge of the share of KV blocks in use.
        counters: By what they count; the page appends `_total`.
        histograms: By what they count.
        cache_config: Info metric with the sizes of the KV cache; empty: none.
        sizes: Gauges of these sizes, by what they say.
        ended: Counter of ended requests by reason; empty: none.
    """

    labels: Mapping[str, str]
    running: str
    waiting: str
    usage: str
    counters: Mapping[str, str]
    histograms: Mapping[str, HistogramNames]
    cache_config: str = ""
    sizes: Mapping[str, str] = field(default_factory=dict)
    ended: str = ""


_TEXTS = {
    "ttft": "Time to first token.",
    "itl": "Time between two tokens.",
    "tpot": "Mean time between the tokens of a request.",
    "e2e": "Time from arrival to end.",
    "queue": "Time in the waiting queue.",
    "prefill": "Time from admission to first token.",
    "decode": "Time from first to last token.",
}


def _histograms(prefix: str, **named: tuple[str, tuple[float, ...]]) -> dict[str, HistogramNames]:
    return {
        key: HistogramNames(f"{prefix}{name}_seconds", _TEXTS[key], bounds)
        for key, (name, bounds) in named.items()
    }


#: Those of version 0.32.
_VLLM = PageNames(
    labels={"engine": "0"},
    running="vllm:num_requests_running",
    waiting="vllm:num_requests_waiting",
    usage="vllm:kv_cache_usage_perc",
    counters={
        key: f"vllm:{key}"
        for key in (
            "num_preemptions",
            "prefix_cache_queries",
            "prefix_cache_hits",
            "prompt_tokens",
            "prompt_tokens_cached",
            "generation_tokens",
        )
    },
    histograms=_histograms(
        "vllm:",
        ttft=("time_to_first_token", TTFT_BOUNDS_S),
        itl=("inter_token_latency", TOKEN_BOUNDS_S),
        tpot=("request_time_per_output_token", TOKEN_BOUNDS_S),
        e2e=("e2e_request_latency", REQUEST_BOUNDS_S),
        queue=("request_queue_time", REQUEST_BOUNDS_S),
        prefill=("request_prefill_time", REQUEST_BOUNDS_S),
        decode=("request_decode_time", REQUEST_BOUNDS_S),
    ),
    cache_config="vllm:cache_config_info",
    ended="vllm:request_success",
)
#: V0 has no label of the engine, the older name of the usage, and no counters of cached tokens.
_VLLM_V0 = replace(
    _VLLM,
    labels={},
    usage="vllm:gpu_cache_usage_perc",
    counters={
        key: f"vllm:{key}" for key in ("num_preemptions", "prompt_tokens", "generation_tokens")
    },
    histograms=_histograms(
        "vllm:",
        ttft=("time_to_first_token", TTFT_BOUNDS_S),
        itl=("time_per_output_token", TOKEN_BOUNDS_S),
        e2e=("e2e_request_latency", REQUEST_BOUNDS_S),
        queue=("request_queue_time", REQUEST_BOUNDS_S),
        prefill=("request_prefill_time", REQUEST_BOUNDS_S),
        decode=("request_decode_time", REQUEST_BOUNDS_S),
    ),
)
#: As in SGLang's srt/metrics/collector.py.
_SGLANG = PageNames(
    labels={"engine_type": "unified", "tp_rank": "0", "pp_rank": "0"},
    running="sglang:num_running_reqs",
    waiting="sglang:num_queue_reqs",
    usage="sglang:token_usage",
    counters={
        "prompt_tokens": "sglang:prompt_tokens",
        "prompt_tokens_cached": "sglang:cached_tokens",
        "generation_tokens": "sglang:generation_tokens",
        "requests": "sglang:num_requests",
        "aborted": "sglang:num_aborted_requests",
        "num_preemptions": "sglang:num_retracted_requests",
    },
    histograms=_histograms(
        "sglang:",
        ttft=("time_to_first_token", _SGLANG_TTFT_BOUNDS_S),
        itl=("inter_token_latency", _SGLANG_TOKEN_BOUNDS_S),
        e2e=(
            "e2e_request_latency",
            (*_SGLANG_TTFT_BOUNDS_S, 600.0, 1200.0, 1800.0, 2400.0),
        ),
    ),
    sizes={"tokens": "sglang:max_total_num_tokens"},
)
#: As in TensorRT-LLM's metrics/collector.py.
_TRTLLM = PageNames(
    labels={"engine_type": "trtllm"},
    running="trtllm_num_requests_running",
    waiting="trtllm_num_requests_waiting",
    usage="trtllm_kv_cache_utilization",
    counters={
        "prompt_tokens": "trtllm_prompt_tokens",
        "prompt_tokens_cached": "trtllm_prompt_cached_tokens",
        "generation_tokens": "trtllm_generation_tokens",
        "requests": "trtllm_num_requests_completed",
    },
    histograms=_histograms(
        "trtllm_",
        ttft=("time_to_first_token", TTFT_BOUNDS_S),
        tpot=("time_per_output_token", TOKEN_BOUNDS_S),
        e2e=("e2e_request_latency", REQUEST_BOUNDS_S),
        queue=("request_queue_time", REQUEST_BOUNDS_S),
        prefill=("request_prefill_time", _TRTLLM_PREFILL_BOUNDS_S),
        decode=("request_decode_time", REQUEST_BOUNDS_S),
    ),
    sizes={
        "blocks": "trtllm_kv_cache_max_blocks",
        "free_blocks": "trtllm_kv_cache_free_blocks",
        "used_blocks": "trtllm_kv_cache_used_blocks",
        "tokens_per_block": "trtllm_kv_cache_tokens_per_block",
    },
    ended="trtllm_request_success",
)
NAMES: dict[EngineName, PageNames] = {
    "vllm": _VLLM,
    "vllm-priority": _VLLM,
    "vllm-v0": _VLLM_V0,
    "sglang": _SGLANG,
    "trtllm": _TRTLLM,
}
