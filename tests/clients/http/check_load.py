"""A load generator: guidellm's requests through the router, and what it measures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from .served import KEY, MODEL

NUM_REQUESTS, NUM_STREAMS = 40, 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A tokenizer of words, made here: none is fetched."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"?": 0, "the": 1, "end": 2}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="?", eos_token="end", pad_token="end"
    ).save_pretrained(folder)
    return folder


def ttft(page: str) -> tuple[float, float]:
    """Number and sum of the times to the first token that the router has counted."""
    name = "servegym_router_ttft_seconds"
    samples = {
        sample.name: sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name.startswith(name)
    }
    return samples["servegym_router_ttft_seconds_count"], samples[
        "servegym_router_ttft_seconds_sum"
    ]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_guidellm(served, tokenizer, tmp_path, path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(
            json.dumps({"prompt": f"request {i} " + "word " * (50 + 10 * i)}) + "\n"
            for i in range(NUM_REQUESTS)
        )
    )
    out = tmp_path / "report.json"
    served.fault("slow", value=4.0)  # so that the first token takes long
    before = ttft(served.metrics())
    command = [
        Path(sys.executable).with_name("guidellm"),
        "run",
        "--backend",
        json.dumps(
            {
                "kind": "openai_http",
                "target": served.url,
                "model": MODEL,
                "api_key": KEY,
                "request_format": path,
            }
        ),
        "--profile",
        json.dumps({"kind": "concurrent", "streams": [NUM_STREAMS]}),
        "--constraint",
        json.dumps({"kind": "max_requests", "count": NUM_REQUESTS}),
        "--tokenizer",
        json.dumps({"kind": "huggingface_auto", "model": str(tokenizer)}),
        "--data",
        json.dumps({"kind": "json_file", "path": str(prompts)}),
        "--output",
        json.dumps({"kind": "json", "path": str(out)}),
        "--disable-console",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    metrics = report["benchmarks"][0]["metrics"]
    totals = metrics["request_totals"]
    errors = report["benchmarks"][0]["requests"]["errored"]
    assert totals["errored"] == 0, str(errors)[:2000]
    # at its limit it drops what is still in flight
    assert NUM_REQUESTS - NUM_STREAMS <= totals["successful"] <= NUM_REQUESTS
    after = ttft(served.metrics())
    num, mean_s = after[0] - before[0], (after[1] - before[1]) / (after[0] - before[0])
    assert num >= totals["successful"]
    measured_s = metrics["time_to_first_token_ms"]["successful"]["mean"] / 1e3
    # both see the first token, and not an event before it: what is between them is little
    assert mean_s <= measured_s < 2.0 * mean_s + 0.3
