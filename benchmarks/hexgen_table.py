"""Compare the costs of single requests with HexGen-Text2SQL's: `python benchmarks/hexgen_table.py`.

Prompt and output lengths, and seconds on A100, A6000 and L40, are the means in the authors' tables
(`workflow.workloads.text_to_sql`); ours are of engines of four GPUs with Llama-3.1-70B and nothing
else to do. The L40S stands for the L40.
"""

from __future__ import annotations

from servegym.costs.grid import CostGrid
from servegym.workflow.workloads.text_to_sql import FIGURES, Figures
from servegym.workflow_scenario import load_workflow_scenario

THEIRS = {"A100-SXM-80GB": "a100_s", "RTX-A6000": "a6000_s", "L40S": "l40_s"}


def alone_s(grid: CostGrid, budget: int, figures: Figures) -> float:
    """Seconds of one request: its prompt in chunks of `budget` tokens, then a step a token."""
    total_s, done = 0.0, 0
    while done < figures.prompt_tokens:
        chunk = min(budget, figures.prompt_tokens - done)
        total_s += grid.step_s([(chunk, done)])
        done += chunk
    context = figures.prompt_tokens + figures.output_tokens // 2
    return total_s + (figures.output_tokens - 1) * grid.step_s([], 1, context)


def main() -> None:
    """Print ratios in Markdown."""
    types = load_workflow_scenario("text-to-sql-deadlines").spec.types
    engines = {t.name.split(" ")[0]: t.engine for t in types if t.engine}
    print("| step, ours over theirs |", *(f"{name} |" for name in THEIRS))
    print("|---" * (len(THEIRS) + 1) + "|")
    for step, figures in FIGURES.items():
        cells = []
        for name, column in THEIRS.items():
            engine = engines[name]
            ours_s = alone_s(engine.grid, engine.max_num_batched_tokens, figures)
            cells.append(f"{ours_s / getattr(figures, column):.2f} |")
        print(f"| {step.name.lower()} |", *cells)


if __name__ == "__main__":
    main()
