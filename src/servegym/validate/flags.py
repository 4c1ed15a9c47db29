"""Whether a simulated figure is validated or extrapolated, and guesses at what is wrong."""

from __future__ import annotations

from servegym.assets.specs import model
from servegym.validate.engine import EngineSetup
from servegym.validate.published import Experiment, Row


def extrapolations(
    setup: EngineSetup, family: str, quality: str = "A", *, apart: bool = False
) -> list[str]:
    """Say why a setup lies outside what costs and scheduler stand for; empty: validated.

    Args:
        setup: The engine.
        family: Engine family.
        quality: Grade of the measurement.
        apart: Whether others prefill for it.
    """
    evidence = setup.cost().evidence
    reasons = [f"{e.operator}: {e.note}" for e in evidence if e.kind == "prior"]
    if setup.expert_ranks > 1:
        reasons.append("agreement of data-parallel ranks is not simulated")
    if setup.acceptance:
        reasons.append("verifying drafts was not measured, and how many are accepted is given")
    if apart:
        reasons.append("prefill and decode apart: by the rules of vLLM V1, not compared live")
    elif setup.rules != "vllm":
        reasons.append(f"scheduler of {setup.rules} as in its source, not compared with it live")
    elif family not in ("vllm", "vllm-sync"):
        reasons.append(f"{family} replayed as vLLM V1")
    if quality == "C":
        reasons.append("GPU or lengths inferred")
    return reasons


def guess(row: Row, plan: Experiment, simulated: dict[str, float], preemptions: int) -> str:
    """Guess why a row is far off: one sentence, the most specific cause that applies."""
    measured = row.measured
    tpot_low = simulated.get("tpot_s", 0.0) < measured.get("tpot_s", 0.0)
    rate_high = simulated["output_tokens_per_s"] > measured.get("output_tokens_per_s", 1e99)
    too_fast = tpot_low or rate_high
    if preemptions:
        return "KV cache overflows in the simulator: size of the KV cache or its precision"
    if plan.family.endswith("-rocm"):
        return "ROCm engine of its time: untuned kernels, eager mode" if too_fast else "prior costs"
    if plan.family in ("vllm-v0", "deepspeed", "tgi"):
        return "engine of 2024: scheduling and sampling on the CPU between steps"
    if model(plan.setup.model).num_experts:
        return "experts: routing and fused-kernel efficiency, expert parallelism"
    prompt_heavy = plan.prompt_tokens > 8 * plan.output_tokens
    if prompt_heavy and not too_fast:
        return "measured prefill faster than the GEMMs allow: prefix cache or fewer prompt tokens"
    if plan.setup.precision == "fp8":
        return "fp8 GEMMs: one form for several kernels" + (
            ", fp8 KV cache" if not too_fast else ""
        )
    if plan.setup.tp >= 4 and too_fast:
        return "collectives and launches of many small kernels at this degree"
    if too_fast:
        return "work per step and sequence outside the kernels (CPU, sampling)"
    return "kernels or scheduler: no specific sign"
