"""Play requests through vLLM's own server, which overlaps steps, with the plug-in.

    python through_server.py VLLM_PYTHON MODEL ORDER OUT

The same requests as `play.py`, arriving by the clock; the model is computed.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from client import play
from replicas import EngineSize, Replica
from workload import Drawn, draw

from servegym.serve.vllm.hints import PREDICTED_OUTPUT_TOKENS, TTFT_SLO_S

SIZE = EngineSize(
    block_size=32, num_blocks=59, max_num_seqs=32, max_num_batched_tokens=256, max_model_len=1024
)
STEP_S = 0.008


def body(drawn: Drawn) -> dict[str, Any]:
    """A request with its client's hints."""
    return {
        "model": "tiny",
        "prompt": drawn.prompt,
        "max_tokens": drawn.output_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "priority": drawn.priority,
        "return_token_ids": True,
        "vllm_xargs": {
            PREDICTED_OUTPUT_TOKENS: drawn.predicted_tokens,
            TTFT_SLO_S: drawn.ttft_slo_s,
        },
    }


async def main() -> None:
    """Serve, play, write."""
    python, model, order, out = sys.argv[1:]
    path = Path(out)
    stats = path.with_suffix(".stats")
    replica = Replica(
        Path(python),
        Path(model).resolve(),
        path.parent,
        "server",
        SIZE,
        plugin={"policy": order, "stats_file": str(stats), "report_every_s": 0.5},
        overlapped=True,
    )
    requests = draw(240, 1.0, 1024, seed=9)
    try:
        async with aiohttp.ClientSession() as session:
            await replica.ready(session)
        bodies = [body(drawn) for drawn in requests]
        answers = await play(replica.url, bodies, [drawn.step * STEP_S for drawn in requests])
        # a step more, with which the last ones are reported
        await play(replica.url, bodies[:1], [1.0])
    finally:
        replica.stop()
    told = {
        "tokens": {str(i): answer.token_ids for i, answer in enumerate(answers)},
        "errors": [answer.error for answer in answers if answer.error],
        "mean_e2e_s": float(np.mean([answer.end_s - answer.due_s for answer in answers])),
        "plugin": json.loads(stats.read_text()),
    }
    path.write_text(json.dumps(told))


if __name__ == "__main__":
    asyncio.run(main())
