"""Settings of InferenceX's scripts, as they were at the versions of the rows."""

from __future__ import annotations

import json

import pytest

from servegym.cli import main
from servegym.validate.engine import EngineConstants
from servegym.validate.experiments import play
from servegym.validate.published import experiment, read_published
from servegym.validate.reception import Reception
from servegym.validate.recipes import Recipe, recipe

NOTES = "agg; InferenceX/InferenceMAX dump (lengths random in [0.8,1.0]x nominal)"
TEXT = {"notes": NOTES, "gpu": "b200_sxm", "precision_w": "fp8"}
LOAD = {"isl": "1024", "osl": "1024", "concurrency": "64"}


@pytest.mark.parametrize(
    ("family", "version", "text", "model", "tp", "expected"),
    [
        # 64 + 1,024 + 64, rounded up to whole 64
        ("trtllm", "1.1.0rc2.post2", {}, "DeepSeek-R1", 8, Recipe(1152)),
        ("trtllm", "1.1.0rc2.post2", {"concurrency": "4"}, "DeepSeek-R1", 8, Recipe(1152)),
        ("trtllm", "1.1.0rc2.post2", {"concurrency": "65"}, "DeepSeek-R1", 8, Recipe(1216)),
        ("trtllm", "1.2.0rc6.post2", {}, "DeepSeek-V3", 1, Recipe(8192)),
        ("trtllm", "1.2.0rc6.post2", {"isl": "8192"}, "DeepSeek-R1", 8, Recipe(8320)),
        ("trtllm", "1.2.0rc6.post3", {}, "DeepSeek-R1", 8, Recipe(1152)),
        ("trtllm", "", {}, "gpt-oss-120b", 2, Recipe(20_000)),
        ("trtllm", "", {}, "Llama-3.1-70B", 2, Recipe(16_384)),
        ("trtllm", "", {"gpu": "h200_sxm"}, "Llama-3.1-70B", 2, Recipe(2248)),
        ("trtllm", "", {}, "Qwen3-32B", 2, Recipe()),
        ("trtllm", "1.1.0rc2.post2", {"notes": "NVIDIA"}, "DeepSeek-R1", 8, Recipe()),
        ("trtllm", "", {"notes": NOTES + "; disagg"}, "DeepSeek-R1", 8, Recipe()),
        ("sglang", "0.5.9", {"gpu": "h200_sxm"}, "DeepSeek-R1", 8, Recipe(32_768)),
        ("sglang", "0.5.9", {}, "DeepSeek-R1", 8, Recipe(32_768, "fp8")),
        ("sglang", "0.5.9", {}, "DeepSeek-R1", 4, Recipe(8192, "fp8")),
        ("sglang", "0.5.9", {"precision_w": "nvfp4"}, "DeepSeek-R1", 4, Recipe(16_384, "fp8")),
        ("sglang", "0.5.9", {"gpu": "gb200"}, "DeepSeek-R1", 4, Recipe()),
        ("sglang", "0.5.9", {}, "Qwen3-32B", 4, Recipe()),
        ("vllm", "0.19.0", {}, "DeepSeek-R1", 8, Recipe()),
    ],
)
def test_scripts_set_the_budget_and_the_cache(family, version, text, model, tp, expected):
    assert recipe(family, version, TEXT | LOAD | text, model, tp) == expected


ROW = LOAD | {
    "notes": NOTES,
    "engine": "trtllm",
    "model": "deepseek-ai/DeepSeek-R1",
    "precision_w": "fp8",
    "gpu": "b200_sxm",
    "gpu_count": "8",
    "tp": "8",
    "tpot_mean": "90",
}

FP4 = ROW | {"precision_w": "nvfp4"}


def test_a_row_is_replayed_with_the_budget_of_its_script(write_table):
    old, new = (
        experiment(read_published(write_table(FP4 | {"engine_version": version}))[0])
        for version in ("1.1.0rc2.post2", "1.2.0rc6.post2")
    )
    assert (old.setup.max_num_batched_tokens, new.setup.max_num_batched_tokens) == (1152, 8192)
    assert old.setup.max_num_seqs == 1152
    # one prompt a step, or up to eight: the last of 64 waits for 63 steps, or for seven
    assert play(old, EngineConstants())[0]["ttft_s"] > play(new, EngineConstants())[0]["ttft_s"]


def test_limits_in_the_notes_go_before_those_of_the_script(write_table):
    notes = NOTES + "; max_num_seqs=512, max_num_batched_tokens=4096"
    [row] = read_published(write_table(ROW | {"notes": notes, "engine_version": "1.1.0rc2"}))
    setup = experiment(row).setup
    assert (setup.max_num_seqs, setup.max_num_batched_tokens) == (512, 4096)


@pytest.mark.parametrize(
    ("changed", "steps"),
    [
        ({}, 40),
        ({"concurrency": "32"}, 0),
        ({"concurrency": "256"}, 0),
        ({"osl": "8192"}, 0),
        ({"precision_w": "nvfp4"}, 0),
        ({"engine_version": "1.1.0rc2.post2"}, 0),
    ],
)
def test_prompts_are_gathered_where_a_script_says_so(write_table, changed, steps):
    cells = ROW | {"engine_version": "1.2.0rc6.post2"} | changed
    reception = experiment(read_published(write_table(cells))[0]).reception
    assert reception == Reception(overlapped=True, gather_steps=steps)


def test_settings_are_in_the_numbers(tmp_path, write_table, capsys):
    ranks = {"file": "aic_inferencex", "source": "id=x_tp8_0_ep8_0_7", "tp": "1", "dp": "8"}
    table = write_table(FP4 | ranks | {"ep": "8", "engine_version": "1.1.0rc2"})
    main(["validate", "--published", str(table), "--json", str(tmp_path / "a.json")])
    [row] = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert row["setup"]["together"] == {"timeout_steps": 60, "gather_steps": 0}
    assert row["setup"]["max_num_batched_tokens"] == 1152
