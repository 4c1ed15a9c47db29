"""Settings in notes of real rows."""

from __future__ import annotations

import pytest

from servegym.validate.limits import StatedLimits, stated_limits


@pytest.mark.parametrize(
    ("notes", "found"),
    [
        (
            "8xMi300x 1FP8-meta; ShareGPT 1000 prompts; num-scheduler-steps=15 "
            "chunked_prefill=FALSE max_num_seqs=1024",
            StatedLimits(max_num_seqs=1024, chunked_prefill=False),
        ),
        (
            "8xH100 1FP8-meta; num-scheduler-steps=1 chunked_prefill=TRUE max_num_seqs=512",
            StatedLimits(max_num_seqs=512, chunked_prefill=True),
        ),
        (
            "per-request arrivals in requests/llmservingsim_RTX4090.jsonl; max_num_seqs=256 "
            "max_num_batched_tokens=2048; kv blocks=2588x16; recomputed",
            StatedLimits(256, 2048, 2588, 16),
        ),
        (
            "max_num_seqs=128 max_num_batched_tokens=2048; kv blocks=n/ax16",
            StatedLimits(max_num_seqs=128, max_num_batched_tokens=2048),
        ),
        (
            "TPU generation not printed; max_num_batched_tokens=512 max_num_seqs=512",
            StatedLimits(max_num_seqs=512, max_num_batched_tokens=512),
        ),
        ("1P1D disaggregated TP8+TP8, chunked prefill off", StatedLimits(chunked_prefill=False)),
        (
            "--max-num-seqs 64 --gpu-memory-utilization 0.95, prefix caching on",
            StatedLimits(max_num_seqs=64, memory_fraction=0.95, prefix_caching=True),
        ),
        ("default vLLM flags; 256 sequences; chunked", StatedLimits()),
    ],
)
def test_limits_are_read_by_the_names_engines_give_them(notes, found):
    assert stated_limits(notes) == found
