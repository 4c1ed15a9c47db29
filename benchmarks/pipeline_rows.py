"""NVIDIA's offline throughput with pipeline stages, against the simulator and against full load.

    python benchmarks/pipeline_rows.py FILE [--sequence-us 25]

FILE is a table of published measurements as of `servegym validate --published`. The rows are those
of Llama-3.3-70B in nvfp4 on RTX PRO 6000 by TensorRT-LLM 1.0: one GPU, and 2, 4 and 8 stages of
one. Prints for each degree by how much the throughput is off:

- simulated, as `servegym validate` does it; median of the absolute errors, median, range;
- the same if each stage took so many microseconds more for every decoding sequence of a batch, to
  see what such work of the CPU would explain (nothing is set to that);
- of the stages' costs at full load, with nothing simulated: as many equal batches as stages go
  round, with all sequences that KV, 2,048 in all and 8,192 tokens a batch allow, and each takes as
  many prompts as requests end in it. A real run has unequal batches, a start and an end: this is
  an upper bound of what costs allow.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from servegym.assets.specs import gpu, model
from servegym.costs.pipeline import PipelineCost
from servegym.costs.step import StepCost
from servegym.validate.engine import EngineConstants
from servegym.validate.experiments import play
from servegym.validate.published import Row, experiment, read_published

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


def full_load(pipeline: PipelineCost, prompt: int, output: int) -> float:
    """Output tokens a second of equal batches, all with as many sequences as fit."""
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
    return pipeline.pp * sequences / max(through_s, pipeline.pp * max(stages))


def errors(row: Row, whole: StepCost, sequence_s: float) -> tuple[float, float, float]:
    """Relative errors of the throughput: simulated, with more time a sequence, at full load."""
    plan = experiment(row)
    found = [
        play(plan, EngineConstants(sequence_s=more_s))[0]["output_tokens_per_s"]
        for more_s in (0.0, sequence_s)
    ]
    pipeline = PipelineCost(whole, plan.setup.pp)
    found.append(full_load(pipeline, round(plan.prompt_tokens), round(plan.output_tokens)))
    plain, slower, bound = (one / row.measured["output_tokens_per_s"] - 1.0 for one in found)
    return plain, slower, bound


def cell(found: Sequence[float]) -> str:
    """Median of the absolute errors, median with sign and range."""
    off = median(abs(one) for one in found)
    return f"{off:.0%}; {median(found):+.0%}, {min(found):+.0%} to {max(found):+.0%}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="table of published measurements")
    parser.add_argument("--sequence-us", type=float, default=25.0, help="of each stage and batch")
    args = parser.parse_args()
    whole = StepCost(
        gpu("RTX-PRO-6000"), model("Llama-3.1-70B"), fp4=True, fp8_kv=True, engine="trtllm"
    )
    found: dict[int, list[tuple[float, float, float]]] = {}
    for row in filter(is_wanted, read_published(args.file)):
        one = errors(row, whole, 1e-6 * args.sequence_us)
        found.setdefault(int(row.text["pp"] or 1), []).append(one)
    print(f"| stages | rows | simulated | {args.sequence_us:g} us a sequence | full load |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for pp, rows in sorted(found.items()):
        print(f"| {pp} | {len(rows)} | {' | '.join(map(cell, zip(*rows, strict=True)))} |")


if __name__ == "__main__":
    main()
