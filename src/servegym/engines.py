"""Serving engines by name: whose rules a replica follows."""

from __future__ import annotations

from typing import Literal, get_args

#: `vllm` is V1, the engine since 2025, and `vllm-priority` the same with `--scheduling-policy
#: priority`; docs/simulator.md has the rules of each.
EngineName = Literal["vllm", "vllm-v0", "sglang", "trtllm", "vllm-priority"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
#: Tokens of a step where nobody sets them: vLLM's for a server on a small GPU; the longest context
#: of common models, which V0 takes; SGLang's `chunked_prefill_size` on GPUs of 60 to 160 GiB;
#: TensorRT-LLM's `max_num_tokens`.
MAX_NUM_BATCHED_TOKENS: dict[EngineName, int] = {
    "vllm": 2048,
    "vllm-v0": 8192,
    "sglang": 8192,
    "trtllm": 8192,
    "vllm-priority": 2048,
}
# The places in `ENGINES`, for compiled code.
VLLM, VLLM_V0, SGLANG, TRTLLM, VLLM_PRIORITY = range(5)


def kernels_of(engine: EngineName) -> EngineName:
    """Name the engine whose kernels one has: the order of requests changes none."""
    return "vllm" if engine == "vllm-priority" else engine
