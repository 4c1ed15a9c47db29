"""TensorRT-LLM's rows of DeepSeek that decode speculatively, replayed with and without drafts.

    python benchmarks/drafted_rows.py FILE [--acceptance 0.7 0.8 0.9]

FILE is a table of published measurements as of `servegym validate --published`. Which rows decode
speculatively no column says; those of TensorRT-LLM's DeepSeek-R1 of three days are 1.4 to 2.1 times
faster than their neighbours (docs/fidelity.md). InferenceX has scripts for both ways, which draft 3
tokens with tensor-parallel attention (`dsr1_*_trt_mtp.sh`). How many of them are accepted is not
published with the rows: each draft is taken to be accepted equally often where the one before it
is. Prints by how much TPOT is off, in the median and for eight of ten, by prompt and clients.
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
NUM_DRAFTS = 3


def is_wanted(row: Row) -> bool:
    """Whether a row is one of those."""
    text = row.text
    return (
        text["date"] in DAYS
        and text["engine"] == "trtllm"
        and text["model"].endswith("DeepSeek-R1")
        and "disagg" not in text["notes"]
    )


def tpot_s(plan: Experiment, acceptance: tuple[float, ...]) -> float:
    """TPOT of a row with such drafts."""
    drafted = replace(plan, setup=replace(plan.setup, acceptance=acceptance))
    return play(drafted, EngineConstants())[0]["tpot_s"]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="table of published measurements")
    parser.add_argument("--acceptance", type=float, nargs="+", default=[0.6, 0.7, 0.8, 0.9])
    args = parser.parse_args()
    ways = [(), *(tuple(a ** (i + 1) for i in range(NUM_DRAFTS)) for a in args.acceptance)]
    found: dict[tuple[str, str], list[list[float]]] = {}
    left_out: Counter[str] = Counter()
    for row in filter(is_wanted, read_published(args.file)):
        try:
            plan = experiment(row)
            errors = [tpot_s(plan, way) / row.measured["tpot_s"] - 1.0 for way in ways]
        except ConfigError as error:
            left_out[str(error)] += 1
            continue
        for group in (("all", ""), (row.text["precision_w"], row.text["isl"])):
            found.setdefault(group, []).append(errors)
    for reason, count in left_out.most_common():
        print(f"{count} rows left out: {reason}")
    heads = " | ".join(["no drafts", *(f"{a:g}" for a in args.acceptance)])
    print(f"| precision, prompt | rows | {heads} |")
    for group, rows in sorted(found.items()):
        cells = []
        for column in zip(*rows, strict=True):
            low, high = np.quantile(column, [0.1, 0.9])
            off = median(abs(one) for one in column)
            cells.append(f"{off:.0%}; {median(column):+.0%}, {low:+.0%} to {high:+.0%}")
        print(f"| {' '.join(group)} | {len(rows)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
