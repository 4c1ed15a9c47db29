"""Workloads of one replica as plain data, so that another engine can read them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from servegym.cluster.spec import ClusterSpec, Episode, Link, ReplicaType, TransferRules
from servegym.costs.grid import (
    NUM_BATCH_KNOTS,
    NUM_CHUNK_KNOTS,
    NUM_CONTEXT_KNOTS,
    NUM_DENSE_KNOTS,
    NUM_KV_KNOTS,
    CostGrid,
)
from servegym.workloads.table import RequestTable

LONGEST = 120
LONGEST_TURN = 3500


def cost_grid(cost: dict[str, float]) -> CostGrid:
    """Build the grid of a step cost: flat, then linear dense term; attention by products."""
    dense = [8.0 * i for i in range(NUM_DENSE_KNOTS)]
    chunk = [16.0 * i for i in range(NUM_CHUNK_KNOTS)]
    context = [16.0 * i for i in range(NUM_CONTEXT_KNOTS)]
    batch = [1.0 * i for i in range(NUM_BATCH_KNOTS)]
    kv = [64.0 * i for i in range(NUM_KV_KNOTS)]
    return CostGrid(
        cpu_s=cost["cpu_s"],
        dense_tokens=np.array(dense),
        dense_s=np.array([cost["dense_s"] * max(x, cost["knee_tokens"]) for x in dense]),
        prefill_chunk=np.array(chunk),
        prefill_context=np.array(context),
        prefill_s=np.array(
            [[cost["prefill_s"] * x * (x + 2.0 * y) for y in context] for x in chunk]
        ),
        decode_batch=np.array(batch),
        decode_kv=np.array(kv),
        decode_s=np.array([[cost["seq_s"] * x + cost["kv_s"] * y for y in kv] for x in batch]),
    )


def random_workload(seed: int, **fixed: Any) -> dict[str, Any]:
    """Draw a workload small enough that blocks, slots and budgets run out often.

    Args:
        seed: Of all that is drawn.
        fixed: Entries to set instead of drawing them; `repeated_outputs` says whether the texts
            that requests share may reach into outputs.
    """
    rng = np.random.default_rng(seed)
    size = int(rng.choice([1, 2, 4, 16]))
    seqs = int(rng.choice([1, 2, 4, 12]))
    chunked = bool(rng.random() < 0.7)
    budget = int(max(seqs, rng.choice([4, 16, 64])))
    spare = int(rng.choice([0, 100, 300, 3000]))
    drawn = {
        "seed": seed,
        "block_size": size,
        "max_num_seqs": seqs,
        "chunked_prefill": chunked,
        "prefix_caching": bool(rng.random() < 0.7),
        "repeated_outputs": bool(rng.random() < 0.5),
        "num_blocks": -(-LONGEST // size) + int(rng.integers(0, 1 + spare // size)),
        "max_num_batched_tokens": budget,
        "num_requests": int(rng.integers(1, 60)),
    } | fixed
    if not drawn["chunked_prefill"]:
        drawn["max_num_batched_tokens"] = max(
            drawn["max_num_batched_tokens"], LONGEST + int(rng.integers(0, 100))
        )
    drawn["cost"] = {
        "cpu_s": float(rng.uniform(0.001, 0.01)),
        "dense_s": float(rng.uniform(0, 1e-3)),
        "knee_tokens": float(rng.integers(0, 64)),
        "prefill_s": float(rng.uniform(0, 1e-6)),
        "seq_s": float(rng.uniform(0, 1e-4)),
        "kv_s": float(rng.uniform(0, 1e-5)),
    }
    n = drawn.pop("num_requests")
    repeated_outputs = drawn.pop("repeated_outputs")
    gap_s = rng.choice([0.001, 0.02, 0.2])
    arrival_s = np.cumsum(rng.exponential(gap_s, n) * (rng.random(n) < 0.9))
    requests = []
    for i in range(n):
        prompt = int(rng.integers(1, 70))
        output = 1 + int(rng.integers(1, 50)) * int(rng.random() < 0.9)
        key, end, segments = 0, 0, []
        for _ in range(int(rng.integers(0, 4)) if drawn["prefix_caching"] else 0):
            key = key * 7 + int(rng.integers(1, 4))
            end += [8, 16, 40][key % 3]
            if end > prompt and not repeated_outputs:
                break
            segments.append([key, end])
        requests.append([float(arrival_s[i]), prompt, output, segments])
    return drawn | {"requests": requests}


def random_drafted(seed: int) -> dict[str, Any]:
    """Draw a workload whose requests have drafts, with the blocks and budget that these need."""
    rng = np.random.default_rng((seed, 3))
    workload = random_workload(seed)
    rates = np.sort(rng.uniform(0, 1, int(rng.integers(1, 5))))[::-1]
    ahead = -(-2 * len(rates) // workload["block_size"])
    return workload | {
        "acceptance": rates.tolist(),
        "num_blocks": workload["num_blocks"] + ahead,
        "max_num_batched_tokens": max(workload["max_num_batched_tokens"], 1 + len(rates)),
    }


def random_pair(seed: int) -> dict[str, Any]:
    """Draw a workload for a replica that prefills and one that decodes, with a link in between.

    Either may be short of blocks, and the link slower than both.
    """
    rng = np.random.default_rng((seed, 2))
    workload = random_workload(seed)
    size = workload["block_size"]
    spare = int(rng.choice([0, 100, 1000]))
    pair = {
        "prefill_blocks": -(-LONGEST // size) + int(rng.integers(0, 1 + spare // size)),
        "token_bytes": float(rng.choice([0.0, 1.0])),
        "block_pieces": int(rng.integers(0, 3)),
        "bytes_per_s": float(rng.choice([300.0, 3e3, 1e5])),
        "latency_s": float(rng.choice([0.0, 0.003, 0.1])),
        "piece_s": float(rng.choice([0.0, 1e-4])),
    }
    return workload | {"pair": pair}


def serving_workload(seed: int, *, prefix_caching: bool, num_blocks: int) -> dict[str, Any]:
    """Draw conversations of realistic length, to measure differences instead of finding them.

    Turns come with pauses for thought; each repeats the conversation so far, the answers included.
    """
    rng = np.random.default_rng((seed, 1))
    requests = []
    for session in range(80):
        time_s = float(rng.uniform(0, 60))
        system = int(rng.integers(1, 4))
        segments, text = [[system, 200]], 200
        for turn in range(int(rng.integers(1, 8))):
            prompt = text + int(min(rng.lognormal(4.8, 1.0), 1500)) + 1
            output = int(min(rng.lognormal(4.8, 0.8), 600)) + 1
            if prompt + output > LONGEST_TURN:
                break
            text = prompt + output
            requests.append([time_s, prompt, output, [list(x) for x in segments]])
            segments.append([1000 * (session + 1) + turn, text])
            requests[-1][3].append(segments[-1])
            time_s += float(rng.uniform(5, 25)) + 0.02 * output
    requests.sort(key=lambda r: r[0])
    return {
        "seed": seed,
        "block_size": 16,
        "max_num_seqs": 64,
        "chunked_prefill": True,
        "prefix_caching": prefix_caching,
        "num_blocks": num_blocks,
        "max_num_batched_tokens": 512,
        "cost": {
            "cpu_s": 0.004,
            "dense_s": 6e-5,
            "knee_tokens": 160.0,
            "prefill_s": 4e-9,
            "seq_s": 2e-5,
            "kv_s": 2e-7,
        },
        "acceptance": [0.8, 0.6, 0.4],
        "requests": requests,
    }


def for_driver(workload: dict[str, Any], modes: list[str]) -> dict[str, Any]:
    """Return the workload with its cost written out as arrays, to be played in these modes."""
    grid = cost_grid(workload["cost"])
    arrays = {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in vars(grid).items()
    }
    return workload | {"grid": arrays, "modes": modes}


def cluster_and_episode(workload: dict[str, Any]) -> tuple[ClusterSpec, Episode]:
    """Return the workload as the simulators take it."""
    replica = ReplicaType(
        name="replica",
        grid=cost_grid(workload["cost"]),
        num_blocks=workload["num_blocks"],
        max_num_batched_tokens=workload["max_num_batched_tokens"],
        max_num_seqs=workload["max_num_seqs"],
    )
    types, rules = (replica,), TransferRules()
    if "pair" in workload:
        pair = workload["pair"]
        link = Link(pair["bytes_per_s"], pair["latency_s"], pair["piece_s"])
        types = (
            replace(replica, role="prefill", link=link, num_blocks=pair["prefill_blocks"]),
            replace(replica, role="decode", link=link),
        )
        rules = TransferRules(
            kv_token_bytes=pair["token_bytes"],
            kv_block_pieces=pair["block_pieces"],
            lease_s=float("inf"),
            max_num_held=1000,
        )
    spec = ClusterSpec(
        types=types,
        transfers=rules,
        block_size=workload["block_size"],
        prefix_caching=workload["prefix_caching"],
        chunked_prefill=workload["chunked_prefill"],
    )
    requests = workload["requests"]
    segments = [s for r in requests for s in r[3]]
    table = RequestTable.build(
        np.array([r[0] for r in requests]),
        np.array([r[1] for r in requests]),
        np.array([r[2] for r in requests]),
        prefix_offsets=np.cumsum([0, *(len(r[3]) for r in requests)]),
        prefix_keys=np.array([k for k, _ in segments], np.int64),
        prefix_ends=np.array([end for _, end in segments], np.int32),
    )
    return spec, Episode(table, np.arange(len(types), dtype=np.int16), np.ones(len(types)))
