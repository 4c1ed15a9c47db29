"""Ask AISimulate, where it is installed: drive_aisimulate.py WORK.json ANSWERS.jsonl.

It simulates single requests in passes, as servegym does, and gets the same lengths in the same
order from as many clients.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import yaml
from aisimulate.main import main as aisimulate
from asking import ask_all
from checkpoint import folder_of
from newest import newest_tables

#: Tokens of a block of a trace; requests share none.
BLOCK = 512


def write_trace(piece: dict[str, Any], path: Path) -> None:
    """Write the requests of a piece of work as a trace."""
    lines, first = [], 0
    for prompt, output in zip(piece["prompt_tokens"], piece["output_tokens"], strict=True):
        num_blocks = -(-prompt // BLOCK)
        request = {"timestamp": 0, "input_length": prompt, "output_length": output}
        lines.append(json.dumps(request | {"hash_ids": [*range(first, first + num_blocks)]}))
        first += num_blocks
    path.write_text("\n".join(lines) + "\n")


def configuration(piece: dict[str, Any], checkpoint: Path, trace: Path) -> dict[str, Any]:
    """Return what `aisimulate predict` is told."""
    parallelism = {"tensor": piece["tp"], "attention_data": piece["attention_dp"]}
    if piece["moe_ep"]:
        parallelism |= {"moe_tensor": piece["moe_tp"], "moe_expert": piece["moe_ep"]}
    worker = {
        "parallelism": parallelism,
        "scheduler": {
            "max_batched_tokens": piece["max_num_batched_tokens"],
            "max_sequences": piece["max_num_seqs"],
        },
        "kv_cache": {"prefix_caching": False},
    }
    return {
        "engine": {
            "model": str(checkpoint),
            "hardware": piece["system"],
            "backend": piece["backend"],
            "backend_version": newest_tables(piece["system"], piece["backend"]),
            "workers": {"aggregated": worker},
        },
        "traffic": {
            "source": {
                "type": "trace",
                "paths": [str(trace)],
                "format": "mooncake",
                "block_size": BLOCK,
            },
            "load": {"type": "concurrency", "concurrency": piece["concurrency"]},
        },
    }


def predict(piece: dict[str, Any], work: Path) -> dict[str, float]:
    """Return its figures for a piece of work.

    Raises:
        ValueError: If it has none to give.
    """
    trace, told = work / "trace.jsonl", work / "prediction.yaml"
    write_trace(piece, trace)
    told.write_text(yaml.safe_dump(configuration(piece, folder_of(piece, work), trace)))
    asked = ["predict", "-c", str(told), "--format", "json"]
    asked += ["--overwrite", "--output-dir", str(work / "out")]
    out, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        code = aisimulate(asked)
    if code:
        raise ValueError(said.getvalue().strip() or f"exit code {code}")
    found = json.loads(out.getvalue())
    if found["completed_requests"] != len(piece["prompt_tokens"]):
        raise ValueError("not all requests ended")
    return {
        "tpot_s": found["mean_tpot_ms"] / 1e3,
        "ttft_s": found["mean_ttft_ms"] / 1e3,
        "e2e_s": found["mean_e2e_latency_ms"] / 1e3,
        "output_tokens_per_s": found["output_throughput_tok_s"],
    }


if __name__ == "__main__":
    ask_all(predict)
