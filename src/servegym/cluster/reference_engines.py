"""The plain engines by name."""

from __future__ import annotations

from servegym.cluster.reference_engine import Engine
from servegym.cluster.reference_sglang import Sglang
from servegym.cluster.reference_vllm import TrtLlm, Vllm, VllmPriority, VllmV0
from servegym.engines import EngineName

RULES: dict[EngineName, type[Engine]] = {
    "vllm": Vllm,
    "vllm-v0": VllmV0,
    "sglang": Sglang,
    "trtllm": TrtLlm,
    "vllm-priority": VllmPriority,
}
