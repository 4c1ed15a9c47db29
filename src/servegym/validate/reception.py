"""What lies between a client and the step that computes its prompt.

A request is parsed and encoded by the engine's front end, then waits in an inbox until the
scheduler looks, which not every engine does before every step. The simulator's engines look before
every step; what others wait longer is added to TTFT as a mean, since it is short beside an answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from servegym.cluster.rank_rules import PrefillTogether
from servegym.validate.recipes import is_inferencex

#: HTTP, validation and the client's own work for a request, and encoding one token of its prompt,
#: CPU seconds; `benchmarks/front_end.py`, where engines' servers are made of the same parts.
REQUEST_S = 1.5e-3
PROMPT_TOKEN_S = 3.6e-6


@dataclass(frozen=True)
class Reception:
    """When a scheduler sees a request that has come while its engine is busy.

    Attributes:
        overlapped: Whether a step is formed while the one before runs, so that a request misses one
            step more: vLLM's asynchronous scheduling, the overlap of SGLang and TensorRT-LLM.
        look_steps: Decode steps from one look to the next: SGLang's `scheduler_recv_interval`.
        gather_steps: Steps that the first prompt waits for others to be computed with it:
            TensorRT-LLM's `batch_wait_timeout_iters`.
    """

    overlapped: bool = False
    look_steps: int = 1
    gather_steps: int = 0

    def wait_steps(self, per_step: float) -> float:
        """Return the steps that a request waits longer than where each step looks.

        Args:
            per_step: Requests that come during a step, the mean.
        """
        wait = 0.5 * (self.look_steps - 1) + self.overlapped
        if self.gather_steps:
            others = per_step * self.gather_steps
            wait += self.gather_steps * (1.0 + 0.5 * others) / (1.0 + others)
        return wait

    def companions(self, per_step: float) -> float:
        """Return how many others are computed in the same step, because they were gathered."""
        return per_step * max(self.look_steps - 1, self.gather_steps)


def front_end_s(prompt_tokens: float) -> float:
    """Return the seconds from a client to the scheduler's inbox and back."""
    return REQUEST_S + PROMPT_TOKEN_S * prompt_tokens


def prefill_together(
    family: str, text: dict[str, str], model: str, ranks: int
) -> PrefillTogether | None:
    """Say when the data-parallel ranks of a published row prefill.

    TensorRT-LLM lets them wait for each other where it is told to, as in the scripts of InferenceX
    (`attention_dp_config` in `dsr1_*_trt.sh` and `gptoss_fp4_b200_trt.sh`; the latter leaves the
    limits at their defaults).

    Args:
        family: Engine family.
        text: All cells of the row.
        model: Known name of the model.
        ranks: Of a replica that prefills and decodes.
    """
    apart = "disagg" in text["notes"].lower()
    if family != "trtllm" or ranks == 1 or apart or not is_inferencex(text):
        return None
    if model.startswith("DeepSeek"):
        return PrefillTogether(timeout_steps=60, gather_steps=0)
    return PrefillTogether() if model == "gpt-oss-120b" else None


def reception(family: str, version: str, text: dict[str, str], model: str, tp: int) -> Reception:
    """Say when the scheduler of a published row sees its requests.

    vLLM forms steps ahead by default from 0.14 on (vllm-project/vllm#27614), SGLang since 0.4,
    TensorRT-LLM's PyTorch engine since 1.0. InferenceX sets more, in the scripts of its repository
    (SemiAnalysisAI/InferenceX, `benchmarks/*.sh`).

    Args:
        family: Engine family.
        version: Of the engine; disaggregated rows name that of the program before it.
        text: All cells of the row.
        model: Known name of the model.
        tp: Tensor-parallel degree.
    """
    inferencex = is_inferencex(text)
    found = Reception(
        overlapped=family == "sglang"
        or (family == "vllm" and bool(re.match(r"0\.|nightly", version)))
        or (family == "trtllm" and (inferencex or version.startswith("1.")))
    )
    if not inferencex or "disagg" in text["notes"].lower():
        return found
    clients = int(float(text["concurrency"] or 0))
    if family == "vllm" and model == "gpt-oss-120b":
        return replace(found, overlapped=True)  # gptoss_fp4_*.sh: async-scheduling
    blackwell = text["gpu"].lower().startswith(("b200", "b300"))
    if family == "sglang" and blackwell and model.startswith("DeepSeek"):
        # dsr1_fp4_b200.sh, dsr1_fp8_b200.sh: scheduler-recv-interval
        few = clients < 16 or (text["precision_w"].startswith("fp8") and tp == 4)
        return replace(found, look_steps=10 if few else 30)
    same = text["isl"] == text["osl"] == "1024"
    if family == "trtllm" and same:
        return replace(found, gather_steps=_gather_steps(version, text, model, tp))
    return found


def _gather_steps(version: str, text: dict[str, str], model: str, tp: int) -> int:
    """Return `batch_wait_timeout_iters` of a script for prompts as long as the answers."""
    if model == "Llama-3.1-70B" and tp < 8:
        return 20  # 70b_*_trt_slurm.sh
    fp8_on_b200 = text["gpu"].lower().startswith("b200") and text["precision_w"].startswith("fp8")
    some = 64 <= int(float(text["concurrency"] or 0)) < 256
    if model.startswith("DeepSeek") and fp8_on_b200 and version.startswith("1.2.0rc6.post2"):
        # dsr1_fp8_b200_trt.sh; ranks with attention of their own wait by another rule
        return 40 if some and tp > 1 else 0
    return 0
