"""NVIDIA's offline throughput with pipeline stages against the stages' costs at full load.

    python benchmarks/pipeline_rows.py FILE

FILE is a table of published measurements as of `servegym validate --published`. The rows are those
of Llama-3.3-70B in nvfp4 on RTX PRO 6000 by TensorRT-LLM 1.0: one GPU, and 2, 4 and 8 stages of
one. Nothing is simulated: as many equal batches as stages go round, with all sequences that KV,
2,048 in all and 8,192 tokens a batch allow, and each takes as many prompts as requests end in it.
A real run has unequal batches, a start and an end: this is an upper bound of what costs allow.
Prints the error of each degree, and the milliseconds that a batch took beyond the slowest stage.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median

from servegym.assets.specs import gpu, model
from servegym.costs.pipeline import PipelineCost
from servegym.costs.step import StepCost
from servegym.validate.published import Row, read_published

# as `servegym validate` replays rows of TensorRT-LLM that do not say
MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS, MEMORY_FRACTION = 2048, 8192, 0.95


def is_wanted(row: Row) -> bool:
    """Whether a row is of the family that was measured with and without stages."""
    text = row.text
    return (
        text["file"] == "trt_llm"
        and text["engine_version"] == "1.0"
        and text["model"] == "Llama-3.3-70B"
        and text["gpu"].startswith("RTX-PRO-6000")
        and text["tp"] == "1"
    )


def full_load(pipeline: PipelineCost, prompt: int, output: int) -> tuple[float, float]:
    """Sequences of a batch, and its seconds from token to token."""
    mean_kv = prompt + output / 2
    kv_tokens = pipeline.kv_capacity_tokens(MEMORY_FRACTION)
    sequences = min(kv_tokens / mean_kv, MAX_NUM_SEQS) / pipeline.pp
    sequences = min(sequences, MAX_NUM_BATCHED_TOKENS / (1 + prompt / output))
    prompts = sequences / output
    tokens = sequences + prompts * prompt
    work = pipeline.stage_s(tokens=tokens, batch=sequences, kv_tokens=sequences * mean_kv)
    stages = [
        busy_s + prompts * stage.prefill_s(prompt, 0.0)
        for busy_s, stage in zip(work, pipeline.stages, strict=True)
    ]
    through_s = sum(stages) + (pipeline.pp - 1) * pipeline.handover_s(tokens)
    return sequences, max(through_s, pipeline.pp * max(stages))


def main(path: Path) -> None:
    """Print the table."""
    whole = StepCost(
        gpu("RTX-PRO-6000"), model("Llama-3.1-70B"), fp4=True, fp8_kv=True, engine="trtllm"
    )
    found: dict[int, list[tuple[float, float]]] = {}
    for row in filter(is_wanted, read_published(path)):
        pp = int(row.text["pp"] or 1)
        pipeline = PipelineCost(whole, pp)
        sequences, round_s = full_load(pipeline, int(row.text["isl"]), int(row.text["osl"]))
        measured_s = pp * sequences / float(row.text["tput_out"])
        error = measured_s / round_s - 1.0
        found.setdefault(pp, []).append((error, (measured_s - round_s) / pp))
    print("| stages | rows | throughput, median error | beyond, ms a batch: median, range |")
    print("| ---: | ---: | ---: | ---: |")
    for pp, rows in sorted(found.items()):
        error, beyond = median(e for e, _ in rows), [1e3 * s for _, s in rows]
        spread = f"{median(beyond):.0f}, {min(beyond):.0f} to {max(beyond):.0f}"
        print(f"| {pp} | {len(rows)} | {error:+.0%} | {spread} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
