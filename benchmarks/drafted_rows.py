"""TensorRT-LLM's rows of DeepSeek that decode speculatively, replayed with and without drafts.

    python benchmarks/drafted_rows.py FILE [--acceptance 0.7 0.8 0.9]

FILE is a table of published measurements as of `servegym validate --published`. Which rows decode
speculatively no column says; those of TensorRT-LLM's DeepSeek-R1 of three days are 1.4 to 2.1 times
faster than their neighbours (docs/fidelity.md). InferenceX has scripts for both ways, which draft 3
tokens with tensor-parallel attention and 1 with attention in data parallel (`dsr1_*_trt_mtp.sh`).
How many of them are accepted is not published with the rows: each draft is taken to be accepted
equally often where the one before it is. Prints by how much TPOT is off: the median of the absolute
errors, the median, and what eight of ten lie between.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

from servegym.errors import ConfigError
from servegym.validate.engine import EngineConstants
from servegym.validate.experiments import play
from servegym.validate.published import Experiment, Row, experiment, read_published

DAYS = ("2026-01-14", "2026-02-05", "2026-02-06")
#: Drafts with tensor-parallel attention, and with attention in data parallel.
NUM_DRAFTS, NUM_DRAFTS_OF_RANKS = 3, 1


def is_wanted(row: Row) -> bool:
    """Whether a row is one of those."""
    text = row.text
    return (
        text["date"] in DAYS
        and text["engine"] == "trtllm"
        and text["model"].endswith("DeepSeek-R1")
        and "disagg" not in text["notes"]
    )


def tpot_s(plan: Experiment, rate: float) -> float:
    """TPOT of a row with drafts of which so many are accepted; 0: without."""
    ranks = plan.setup.expert_ranks > 1
    count = (NUM_DRAFTS_OF_RANKS if ranks else NUM_DRAFTS) if rate else 0
    acceptance = tuple(rate ** (i + 1) for i in range(count))
    drafted = replace(plan, setup=replace(plan.setup, acceptance=acceptance))
    return play(drafted, EngineConstants())[0]["tpot_s"]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="table of published measurements")
    parser.add_argument("--acceptance", type=float, nargs="+", default=[0.6, 0.7, 0.8, 0.9])
    args = parser.parse_args()
    found: dict[str, list[list[float]]] = {}
    left_out: Counter[str] = Counter()
    for row in filter(is_wanted, read_published(args.file)):
        try:
            plan = experiment(row)
            measured_s = row.measured["tpot_s"]
            errors = [tpot_s(plan, rate) / measured_s - 1.0 for rate in (0.0, *args.acceptance)]
        except ConfigError as error:
            left_out[str(error)] += 1
            continue
        attention = "data parallel" if plan.setup.expert_ranks > 1 else "tensor parallel"
        for group in (attention, f"{attention}, {row.text['precision_w']} {row.text['isl']}"):
            found.setdefault(group, []).append(errors)
    for reason, count in left_out.most_common():
        print(f"{count} rows left out: {reason}")
    heads = " | ".join(["no drafts", *(f"{a:g}" for a in args.acceptance)])
    print(f"| attention, precision, prompt | rows | {heads} |")
    for group, rows in sorted(found.items()):
        cells = []
        for column in zip(*rows, strict=True):
            low, high = np.quantile(column, [0.1, 0.9])
            off = median(abs(one) for one in column)
            cells.append(f"{off:.0%}; {median(column):+.0%}, {low:+.0%} to {high:+.0%}")
        print(f"| {group} | {len(rows)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
