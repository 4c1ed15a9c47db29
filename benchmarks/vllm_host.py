"""CPU time of vLLM's scheduler in a step of decodes: a GPU waits for it where steps do not overlap.

Runs inside vLLM's environment (`scripts/vllm-env`), without a model:

    ENV/bin/python benchmarks/vllm_host.py

Prints, for numbers of sequences, the median over 269 steps of the time to form a step, to take its
results in, and to encode them for the API server, and their sum for each sequence.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/conformance"))

import drive_vllm
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.serial_utils import MsgpackEncoder

PROMPT, OUTPUT, STEPS, WARM = 1024, 400, 330, 60
GRID = {
    **{"cpu_s": 0.0, "dense_tokens": [0, 1e6], "dense_s": [0, 0]},
    **{"prefill_chunk": [0, 1e6], "prefill_context": [0, 1e6], "prefill_s": [[0, 0], [0, 0]]},
    **{"decode_batch": [0, 1e6], "decode_kv": [0, 1e9], "decode_s": [[0, 0], [0, 0]]},
}


def main() -> None:
    """Print a Markdown table."""
    init_none_hash(sha256)
    base = drive_vllm.base_config()
    print("| sequences | form, us | take in, us | encode, us | a sequence, us |")
    print("|---|---|---|---|---|")
    for batch in (8, 16, 32, 64, 128, 256):
        times = [
            1e6 * statistics.median(column) for column in zip(*measure(base, batch), strict=True)
        ]
        cells = " | ".join(f"{t:.0f}" for t in times)
        print(f"| {batch} | {cells} | {sum(times) / batch:.1f} |", flush=True)


def measure(base: object, batch: int) -> list[tuple[float, float, float]]:
    """CPU seconds of the three parts in each step in which all sequences decode."""
    workload = {
        "requests": [[0.0, PROMPT, OUTPUT, []] for _ in range(batch)],
        **{"grid": GRID, "block_size": 16, "num_blocks": 60000, "prefix_caching": True},
        **{"max_num_seqs": 256, "max_num_batched_tokens": 8192, "chunked_prefill": True},
    }
    driver = drive_vllm.Driver(base, workload, drive_vllm.MODES["default"])
    driver.now_s = 1.0
    driver.admit_arrivals()
    scheduler, encoder, found = driver.scheduler, MsgpackEncoder(), []
    for step in range(STEPS):
        begin = time.process_time()
        formed = scheduler.schedule()
        form_s = time.process_time() - begin
        names = list(formed.num_scheduled_tokens)
        decoding = [scheduler.requests[name].num_computed_tokens >= PROMPT for name in names]
        output = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=[[5] if done else [] for done in decoding],
        )
        begin = time.process_time()
        results = scheduler.update_from_output(formed, output)
        taken = time.process_time()
        for result in results.values():
            encoder.encode(result)
        if step > WARM and len(names) == batch and all(decoding):
            found.append((form_s, taken - begin, time.process_time() - taken))
    return found


if __name__ == "__main__":
    main()
