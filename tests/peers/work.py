"""Published rows as work that other simulators can do, too.

A piece of work says what NVIDIA's AIConfigurator and AISimulate ask for: their name of the system,
a checkpoint whose configuration they ship, degrees, lengths and load, all as `servegym validate`
replays the row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from servegym.assets.specs import model
from servegym.errors import ConfigError
from servegym.validate.experiments import draw_lengths
from servegym.validate.published import Experiment, Row, experiment
from servegym.validate.score import Skipped, short_reason

#: Systems of which both peers have tables.
SYSTEMS = {
    "A100-SXM-80GB": "a100_sxm",
    "B200-SXM-180GB": "b200_sxm",
    "B300-SXM-270GB": "b300_sxm",
    "GB200-192GB": "gb200",
    "H100-SXM-80GB": "h100_sxm",
    "H200-SXM-141GB": "h200_sxm",
    "L40S": "l40s",
    "RTX-PRO-6000": "rtx_pro_6000_server",
}
BACKENDS = {"vllm": "vllm", "vllm-sync": "vllm", "sglang": "sglang", "trtllm": "trtllm"}
#: Checkpoints whose configurations both ship, by model and number format; what is not here is made
#: of the one in bf16 (`checkpoint.py`).
CHECKPOINTS = {
    ("DeepSeek-R1", "fp8-block"): "deepseek-ai/DeepSeek-R1",
    ("DeepSeek-R1", "fp4"): "nvidia/DeepSeek-V3.1-NVFP4",
    ("DeepSeek-V3", "fp8-block"): "deepseek-ai/DeepSeek-V3",
    ("DeepSeek-V3", "fp4"): "nvidia/DeepSeek-V3.1-NVFP4",
    ("Kimi-K2.5", "fp4"): "nvidia/Kimi-K2.5-NVFP4",
    ("Llama-3.1-8B", "bf16"): "meta-llama/Meta-Llama-3.1-8B",
    ("Llama-3.1-70B", "bf16"): "meta-llama/Meta-Llama-3.1-70B",
    ("Llama-3.1-405B", "bf16"): "meta-llama/Meta-Llama-3.1-405B",
    ("MiniMax-M2.5", "fp8-block"): "MiniMaxAI/MiniMax-M2.5",
    ("MiniMax-M2.5", "fp4"): "nvidia/MiniMax-M2.5-NVFP4",
    ("Mixtral-8x22B", "bf16"): "mistralai/Mixtral-8x22B-v0.1",
    ("Qwen3-32B", "bf16"): "Qwen/Qwen3-32B",
    ("Qwen3-235B-A22B", "fp8-block"): "Qwen/Qwen3-235B-A22B-FP8",
    ("gpt-oss-120b", "fp4"): "openai/gpt-oss-120b",
}


class Work(NamedTuple):
    """What a peer is asked.

    Attributes:
        row_id: Of the published row.
        system: GPU, as the peers name it.
        backend: Engine, as the peers name it.
        checkpoint: Whose configuration describes the model.
        weights: Number format that is put on it; empty: its own.
        fp8_kv: Whether the KV cache is kept in fp8.
        tp: Tensor-parallel degree of attention.
        attention_dp: Data-parallel ranks of attention.
        moe_tp: Tensor-parallel degree of the experts; 0 in a dense model.
        moe_ep: Expert-parallel degree; 0 in a dense model.
        prompt_tokens: Of each request, in the order they are sent.
        output_tokens: Likewise.
        concurrency: Clients; where all requests are queued at once, as many as requests.
        queued: Whether all requests are queued at once.
        max_num_seqs: Running requests of an engine.
        max_num_batched_tokens: Token budget of a step.
    """

    row_id: str
    system: str
    backend: str
    checkpoint: str
    weights: str
    fp8_kv: bool
    tp: int
    attention_dp: int
    moe_tp: int
    moe_ep: int
    prompt_tokens: list[int]
    output_tokens: list[int]
    concurrency: int
    queued: bool
    max_num_seqs: int
    max_num_batched_tokens: int


def work(row: Row, plan: Experiment) -> Work:
    """Say what a peer is asked about a row.

    Raises:
        ConfigError: If peers cannot be asked; the message is the reason.
    """
    setup = plan.setup
    if plan.prefill is not None:
        raise ConfigError("disaggregated: other workers and links would have to be assumed")
    if plan.loop == "batch":
        raise ConfigError("a static batch, of an engine older than the peers' tables")
    if plan.loop == "open" or plan.lengths == "spread":
        raise ConfigError("arrivals or lengths are drawn from distributions that peers lack")
    if plan.family not in BACKENDS:
        raise ConfigError(f"peers have no engine like {plan.family}")
    if setup.gpu not in SYSTEMS:
        raise ConfigError(f"peers have no tables of {setup.gpu}")
    own, plain = (CHECKPOINTS.get((setup.model, form)) for form in (setup.precision, "bf16"))
    checkpoint = own or plain
    if checkpoint is None:
        raise ConfigError(f"peers have no configuration of {setup.model} in {setup.precision}")
    prompt, output, _ = draw_lengths(plan)
    experts = model(setup.model).num_experts > 0
    ranks, groups = setup.expert_ranks, setup.expert_groups
    return Work(
        row_id=row.row_id,
        system=SYSTEMS[setup.gpu],
        backend=BACKENDS[plan.family],
        checkpoint=checkpoint,
        weights="" if own else setup.precision,
        fp8_kv=setup.kv_precision == "fp8",
        tp=setup.tp,
        attention_dp=ranks,
        moe_tp=setup.tp // groups if experts else 0,
        moe_ep=ranks * groups if experts else 0,
        prompt_tokens=[int(n) for n in prompt],
        output_tokens=[int(n) for n in output],
        concurrency=plan.concurrency or plan.num_requests,
        queued=plan.loop == "offline",
        max_num_seqs=setup.max_num_seqs,
        max_num_batched_tokens=setup.max_num_batched_tokens,
    )


def group_of(plan: Experiment) -> tuple[str, ...]:
    """Rows alike: the same GPU, engine, model, number format and kind of load."""
    setup = plan.setup
    return setup.gpu, plan.family, setup.model, setup.precision, plan.loop


def drawn(
    rows: Sequence[Row], per_group: int, seed: int = 0
) -> tuple[list[tuple[Row, Work]], list[Skipped]]:
    """Draw rows that peers can be asked about, of each group of alike ones as many as told.

    Returns:
        Rows with their work, in the order of the table, and all rows that peers cannot be asked
        about though the simulator replays them, with the reason.
    """
    rng = np.random.default_rng(seed)
    groups: dict[tuple[str, ...], list[int]] = {}
    found: dict[int, Work] = {}
    left_out = []
    for i, row in enumerate(rows):
        try:
            plan = experiment(row)
        except ConfigError:
            continue  # `servegym validate` counts these
        try:
            found[i] = work(row, plan)
        except ConfigError as error:
            left_out.append(Skipped(row.row_id, row.source, short_reason(str(error))))
            continue
        groups.setdefault(group_of(plan), []).append(i)
    kept = [
        int(i) for group in groups.values() for i in rng.permutation(np.array(group))[:per_group]
    ]
    return [(rows[i], found[i]) for i in sorted(kept)], left_out


def as_json(pieces: Sequence[Work]) -> str:
    """Write work for the programs that run where the peers are installed."""
    return json.dumps([piece._asdict() for piece in pieces])


def figures_of(answers: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the figures of those pieces of work that a peer did, by row."""
    return {answer["row_id"]: answer["figures"] for answer in answers if "figures" in answer}
