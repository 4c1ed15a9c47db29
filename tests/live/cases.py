"""What the three servers are asked: single requests, conversations, or beyond their KV memory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from conversations import LOW, VOCABULARY, answered
from replicas import EngineSize

from servegym.typing import IntArray
from servegym.workloads.table import RequestTable

MODEL = "Llama-3.1-8B"
TIME_SCALE = 8.0
SLO_CLASSES = [{"name": "default", "ttft_s": 5.0, "tpot_s": 1.0}]
#: Of the upper bound of its answer that a client states, over its length: `exp` of a half-normal.
BOUND_SIGMA = 0.5


@dataclass(frozen=True)
class Case:
    """Servers, requests and who is compared.

    Attributes:
        name: Of the scenario.
        size: What the servers are started with.
        rate_rps: To keep the three servers busy, but no more.
        workload: Prompts, answers and sessions, in the form of a YAML file.
        rules: Who is compared with what was trained; `NAME:tuned` is tuned in the simulator.
        max_output_tokens: That clients state, if they do not state the length of their answer.
        states_bounds: Whether each client states an upper bound of its answer instead, which the
            router takes for its length.
        holds: Whether the router may hold requests.
        training: Options of `servegym train`; `{NAME:tuned}` is that rule with its parameters.
    """

    name: str
    size: EngineSize
    rate_rps: float
    workload: dict[str, Any]
    rules: tuple[str, ...]
    max_output_tokens: int = 200
    states_bounds: bool = False
    holds: bool = False
    training: tuple[str, ...] = field(default=("--load", "0.8", "1.1"))

    def scenario(self, calibrations: dict[str, Path], rate_rps: float) -> dict[str, Any]:
        """Return the scenario, in the form of a YAML file."""
        predictor: dict[str, Any] = {"kind": "mean"}
        if self.states_bounds:
            predictor = {"kind": "lognormal", "sigma": BOUND_SIGMA}
        text = {
            "name": self.name,
            "description": "Three paced vLLM servers; costs from their own step logs.",
            "model": MODEL,
            "engine": {
                "block_size": self.size.block_size,
                "max_num_batched_tokens": self.size.max_num_batched_tokens,
                "max_num_seqs": self.size.max_num_seqs,
                "prefix_caching": self.size.enable_prefix_caching,
            },
            "fleet": [
                {"gpu": name, "num_blocks": self.size.num_blocks, "calibration": str(path)}
                for name, path in calibrations.items()
            ],
            "workload": {
                "kind": "generated",
                "rate_rps": rate_rps,
                "arrivals": {"kind": "gamma", "cv": 1.5},
                **self.workload,
            },
            "slo_classes": SLO_CLASSES,
            "disturbances": {"metrics_interval_s": 0.25, "predictor": predictor},
            "num_requests": 512,
        }
        if self.holds:
            text["actions"] = {"hold": True, "hold_s": self.hold_s}
        return text

    @property
    def hold_s(self) -> float:
        """How long a hold lasts, as long in steps as by default in a scenario."""
        return 0.05 * TIME_SCALE

    def stated(self, table: RequestTable) -> IntArray:
        """Return `max_tokens` of each request."""
        if not self.states_bounds:
            return np.full(len(table), self.max_output_tokens)
        error = np.abs(np.random.default_rng(len(table)).normal(0.0, BOUND_SIGMA, len(table)))
        bound = np.ceil(table.output_tokens * np.exp(error)).astype(np.int64)
        return np.minimum(bound, self.max_output_tokens)


def body(prompt: list[int], output_tokens: int, max_tokens: int) -> dict[str, Any]:
    """A request whose length no one can tell from it, but that it is no longer than it says.

    The paced executor's tokens depend on their position alone, so the token at the wanted end
    stops the request.
    """
    return {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stop_token_ids": [answered(len(prompt) + output_tokens - 1)],
        "return_token_ids": True,
    }


def calibration_load(case: Case) -> tuple[list[dict[str, Any]], list[float]]:
    """Requests that show all sizes of batches and prompts."""
    rng = np.random.default_rng(1)
    bodies, due_s, now_s = [], [], 0.0
    for batch in (1, 2, 3, 4, 5, 6, 7, 8, 12, 3, 8, 1, 2, 5, 16, 4, 8, 6, 2, 8):
        for _ in range(batch):
            prompt, output = int(rng.integers(16, 1200)), int(rng.integers(4, 60))
            words = rng.integers(LOW, VOCABULARY, prompt).tolist()
            bodies.append(body(words, output, case.max_output_tokens))
            due_s.append(now_s + float(rng.uniform(0, 2.0)))
        now_s += 8.0
    return bodies, due_s


_LENGTHS = {
    "prompt": {"medians_tokens": [250.0], "sigmas": [0.9], "max_tokens": 1200},
    "output": {"medians_tokens": [35.0], "sigmas": [0.9], "max_tokens": 200},
}

_SIZE = EngineSize(
    block_size=16,
    num_blocks=600,
    max_num_seqs=8,
    max_num_batched_tokens=512,
    max_model_len=2048,
)

ALONE = Case(
    name="sim-to-live",
    size=_SIZE,
    rate_rps=2.6,
    workload=_LENGTHS,
    rules=("round-robin", "least-outstanding", "speed-family", "added-delay"),
)

CHAT = Case(
    name="sim-to-live-chat",
    size=replace(_SIZE, enable_prefix_caching=True),
    rate_rps=2.8,
    workload={
        **_LENGTHS,
        "prompt": {"medians_tokens": [80.0], "sigmas": [0.9], "max_tokens": 500},
        "sessions": {
            "mean_turns": 4.0,
            "think_s": 8.0,
            "num_system_prompts": 4,
            "system_prompt_tokens": 320,
            "zipf": 1.0,
            "max_context_tokens": _SIZE.max_model_len - 200,
        },
    },
    rules=("round-robin", "least-outstanding", "prefix-load", "added-delay-inferred"),
)

SHORT_KV = Case(
    name="sim-to-live-short-kv",
    # the KV of one request of the greatest length, or of five or so of the usual ones
    size=replace(_SIZE, num_blocks=130, max_num_seqs=16),
    rate_rps=1.9,
    workload=_LENGTHS,
    rules=("least-outstanding", "added-delay:tuned", "added-delay-held:tuned"),
    max_output_tokens=400,
    states_bounds=True,
    holds=True,
    training=(
        *("--learner", "cross-entropy", "--base", "{added-delay-held:tuned},most=10"),
        *("--eta", "2", "--spread", "0.2", "--holds-only", "--num-hidden", "0"),
        *("--load", "0.9", "1.2", "--num-candidates", "12", "--num-requests", "1000"),
        *("--num-validation", "8", "--validation-requests", "1000", "--max-generations", "40"),
    ),
)
