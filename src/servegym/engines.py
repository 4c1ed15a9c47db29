"""Serving engines by name: whose rules a replica follows."""

from __future__ import annotations

from typing import Literal, get_args

#: `vllm` is V1, the engine since 2025; docs/simulator.md has the rules of each.
EngineName = Literal["vllm", "vllm-v0", "sglang", "trtllm"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
# The places in `ENGINES`, for compiled code.
VLLM, VLLM_V0, SGLANG, TRTLLM = range(4)
