"""A small real run and a small table of measurements, written as the real ones are."""

from __future__ import annotations

import csv
import gzip
import json

import pytest

from ..toys import constant_grid  # noqa: TID252 - tests are no package

COLUMNS = (
    *(
        "row_id",
        "file",
        "source",
        "date",
        "quality",
        "engine",
        "engine_version",
        "model",
        "precision_w",
    ),
    *(
        "precision_kv",
        "gpu",
        "gpu_count",
        "tp",
        "pp",
        "dp",
        "ep",
        "isl",
        "osl",
        "concurrency",
        "request_rate",
        "notes",
    ),
    *("tput_out", "ttft_mean", "tpot_mean", "itl_mean", "e2e_mean"),
)
ROW = {
    "file": "paper",
    "quality": "A",
    "engine": "vLLM",
    "engine_version": "0.19.0",
    "model": "meta-llama/Llama-3.1-8B",
    "precision_w": "bf16",
    "gpu": "h100_sxm",
    "gpu_count": "1",
    "tp": "1",
    "isl": "128",
    "osl": "16",
    "concurrency": "4",
    "tpot_mean": "8.0",
    "ttft_mean": "20",
}


def write_csv(path, columns, rows):
    with gzip.open(path, "wt", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def write_table(tmp_path):
    """Write a table of measurements; each row is `ROW` with some cells changed."""

    def write(*changes):
        rows = [{"row_id": str(i), **ROW, **change} for i, change in enumerate(changes, 1)]
        return write_csv(tmp_path / "measurements.csv.gz", COLUMNS, rows)

    return write


@pytest.fixture
def write_run(tmp_path):
    """Write a run of three requests on a GPU; returns its folder."""

    def write(gpu="RTX4090", model="meta-llama/Llama-3.1-8B", **settings):
        name = f"vllm019_{gpu}_toy"
        meta = {
            "model": model,
            "vllm_version": "0.19.0",
            "engine_kwargs": {"dtype": "bfloat16", "max_num_seqs": 8, **settings},
            "kv_cache": {"num_gpu_blocks": 500, "block_size": 16},
        }
        (tmp_path / f"{name}_meta.json").write_text(json.dumps(meta))
        requests = [
            {
                "request_id": f"r{i}",
                "arrival_s": 5 + i,
                "input_toks": 100,
                "output_toks": 11,
                "ttft_s": 0.1,
                "e2e_s": 0.6,
            }
            for i in range(3)
        ]
        write_csv(tmp_path / f"{name}_requests.csv.gz", list(requests[0]), requests)
        series = [{"t": t, "running": 1, "waiting": 0, "kv_cache_pct": 2.0} for t in (1.0, 2.0)]
        write_csv(tmp_path / f"{name}_timeseries.csv.gz", list(series[0]), series)
        return tmp_path

    return write


@pytest.fixture
def second_steps():
    """A step cost of 1 s, whatever is in the step."""
    return constant_grid(1.0)
