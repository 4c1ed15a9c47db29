"""Ask AIConfigurator, where it is installed: drive_aiconfigurator.py WORK.json ANSWERS.jsonl.

It has no queue and no single requests: an estimate is of a steady state at a batch, here that of
the clients, at the mean lengths.
"""

from __future__ import annotations

import logging
from pathlib import Path
from statistics import fmean
from typing import Any

from aiconfigurator.cli.api import cli_estimate
from asking import ask_all
from checkpoint import folder_of
from newest import newest_tables


def estimate(piece: dict[str, Any], folder: Path) -> dict[str, float]:
    """Return its figures for a piece of work.

    Raises:
        ValueError: If it has none to give; it raises others, too.
    """
    if piece["queued"]:
        raise ValueError("no queue: the batch that runs would have to be assumed")
    result = cli_estimate(
        str(folder),
        piece["system"],
        backend_name=piece["backend"],
        backend_version=newest_tables(piece["system"], piece["backend"]),
        isl=round(fmean(piece["prompt_tokens"])),
        osl=round(fmean(piece["output_tokens"])),
        batch_size=max(1, round(piece["concurrency"] / piece["attention_dp"])),
        tp_size=piece["tp"],
        attention_dp_size=piece["attention_dp"],
        moe_tp_size=piece["moe_tp"] or None,
        moe_ep_size=piece["moe_ep"] or None,
        kvcache_quant_mode="fp8" if piece["fp8_kv"] else "bfloat16",
    )
    if result.kv_cache_warning:
        raise ValueError("the batch is beyond its KV cache, for which its times do not hold")
    return {
        "tpot_s": float(result.tpot) / 1e3,
        "ttft_s": float(result.ttft) / 1e3,
        "e2e_s": float(result.raw["request_latency"]) / 1e3,
        "output_tokens_per_s": float(result.raw["tokens/s"]),
    }


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    ask_all(lambda piece, made: estimate(piece, folder_of(piece, made)))
