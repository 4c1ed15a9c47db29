"""Calibration files: written, read, used by scenarios and commands, refused when wrong."""

from __future__ import annotations

import json

import pytest
import yaml

from servegym.calibrate import datasheet
from servegym.calibrate.bench import Bench, Timing
from servegym.calibrate.calibration import Calibration, calibrated_cost, cost_from, read_calibration
from servegym.calibrate.engine import EngineFit
from servegym.cli import main
from servegym.errors import ConfigError
from servegym.scenario import parse_scenario

FIT = EngineFit(
    overhead_s=8e-3,
    s_per_prefill_token=3e-5,
    s_per_sequence=4e-5,
    s_per_kv_token=6e-8,
    error=(3.0, 9.0),
    num_steps=500,
    max_prefill_tokens=2048,
    max_sequences=64,
    max_kv_tokens=65536,
)
GOOD = Calibration(gpu="H100-SXM-80GB", model="Llama-3.1-8B", content=FIT)
SCENARIO = """
name: mine
model: {model}
fleet: [{{gpu: H100-SXM-80GB, tp: {tp}, calibration: {path}}}]
workload: {{kind: generated, rate_rps: 1}}
"""
SHEET = "{name: RTX-3090, bf16_flops: 7.0e+13, memory_bytes: 2.4e+10, memory_bytes_per_s: 6.0e+11}"


@pytest.fixture
def path(tmp_path):
    GOOD.write(tmp_path / "c.json")
    return tmp_path / "c.json"


def scenario(path, model="Llama-3.1-8B", tp=1):
    return parse_scenario(SCENARIO.format(path=path, model=model, tp=tp), "mine.yaml")


def test_what_was_written_is_read(path):
    assert read_calibration(path) == GOOD


def test_a_scenario_uses_it(path):
    (replica,) = scenario(path).spec.types
    assert replica.grid.step_s([], 10, 5000) == pytest.approx(8e-3 + 4e-4 + 3e-4, rel=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "Qwen3-8B"}, r"c\.json was made for model Llama-3\.1-8B, not for Qwen3-8B"),
        ({"tp": 2}, r"c\.json was made for tp 1, not for 2"),
        ({"path": "none.json"}, r"no calibration file at none\.json"),
    ],
)
def test_a_scenario_refuses_a_file_made_for_others(path, change, message):
    with pytest.raises(ConfigError, match=message):
        scenario(**{"path": path, **change}).spec


def test_another_precision_is_refused(path):
    with pytest.raises(ConfigError, match="made for precision bf16, not for fp8"):
        calibrated_cost(path, "H100-SXM-80GB", "Llama-3.1-8B", 1, "fp8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is no calibration file"),
        ({"version": 2}, "has format version 2, this servegym reads 1"),
        ({"colour": 1}, "unknown key colour: choose one of content, "),
        ({"content": {**FIT.model_dump(), "overhead_s": -1}}, r"overhead_s: .* got -1"),
        ({"gpu": "H1000"}, "unknown GPU 'H1000'"),
        ({"model": "Llama-9"}, "unknown model 'Llama-9'"),
        ({"content": {**FIT.model_dump(), "s_per_prefill_token": 1e-9}}, "faster than the data"),
        ({"gpu": "X", "datasheet": yaml.safe_load(SHEET)}, "is of RTX-3090, not of X"),
    ],
)
def test_a_wrong_file_is_refused(path, change, message):
    path.write_text(json.dumps({**GOOD.model_dump(mode="json", exclude_none=True), **change}))
    with pytest.raises(ConfigError, match=message):
        cost_from(path)


def test_text_is_no_calibration(path):
    path.write_text("hello")
    with pytest.raises(ConfigError, match="not a readable calibration file"):
        read_calibration(path)


def test_a_data_sheet_must_be_whole_and_new(tmp_path):
    sheet = tmp_path / "sheet.yaml"
    sheet.write_text(SHEET)
    assert datasheet.read_datasheet(sheet).name == "RTX-3090"
    sheet.write_text(SHEET.replace("RTX-3090", "L4"))
    with pytest.raises(ConfigError, match="L4 is known: give --gpu L4"):
        datasheet.read_datasheet(sheet)
    sheet.write_text(SHEET.replace("7.0e+13", "0"))
    with pytest.raises(ConfigError, match="bf16_flops: input should be greater than 0, got 0"):
        datasheet.read_datasheet(sheet)


def refused(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(["calibrate", *words])
    assert end.value.code == 2
    return capsys.readouterr().err


def log(folder):
    """Steps of an L4: 60 ms for the weights, 0.3 ms a prompt token, 0.5 us a KV token."""
    rows = [(0, b, 1000 * b, 6e-2 + 5e-4 * b) for b in range(1, 41)]
    rows += [(c, 0, 0, 6e-2 + 3e-4 * c) for c in range(100, 1700, 100)]
    lines = ["prefill_tokens,decode_sequences,kv_tokens,duration_s"]
    lines += [",".join(str(x) for x in row) for row in rows]
    (folder / "steps.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "steps.csv")


@pytest.mark.parametrize(("task", "says"), [("engine", "validated"), ("adapt", "extrapolated")])
def test_a_log_becomes_a_file_that_costs_shows(task, says, tmp_path, capsys):
    out = str(tmp_path / "l4.json")
    common = ["--model", "Llama-3.1-8B", "--gpu", "L4", "--out", out]
    main(["calibrate", task, "--log", log(tmp_path), *common])
    assert says in capsys.readouterr().out
    main(["costs", "--calibration", out])
    assert (
        f"Llama-3.1-8B on 1 x L4 ({'engine step log' if task == 'engine' else 'adapted prior'}"
        in (capsys.readouterr().out)
    )


def test_adapting_a_measured_gpu_is_refused(tmp_path, capsys):
    words = [
        "adapt",
        "--log",
        log(tmp_path),
        "--model",
        "Llama-3.1-8B",
        "--out",
        str(tmp_path / "x"),
    ]
    assert "kernels of L40S were measured" in refused([*words, "--gpu", "L40S"], capsys)
    assert "name the GPU with --gpu" in refused(words, capsys)


def test_kernels_are_measured_into_a_file(tmp_path, capsys, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(Bench, "__call__", lambda self, kernel: Timing(1.0, 0.5, 5))
    out = tmp_path / "cpu.json"
    tiny = ["--max-tokens", "32", "--max-context", "1024", "--max-batch", "4", "--out", str(out)]
    words = ["calibrate", "kernels", "--device", "cpu", "--model", "Llama-3.1-8B"]
    main([*words, *tiny])
    said = capsys.readouterr().out
    assert "scatter by more than 20%" in said
    assert "measured kernels, validated" in said
    found = read_calibration(out)
    assert found.gpu == "cpu"
    assert found.machine.time
    assert "max-tokens must be at least 32" in refused(
        [*words[1:], "--max-tokens", "1", *tiny[2:]], capsys
    )


def test_cuda_without_a_device_is_refused(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    words = ["kernels", "--device", "cuda", "--model", "Llama-3.1-8B", "--out", str(tmp_path / "x")]
    assert "torch sees no CUDA device" in refused(words, capsys)


def test_the_plug_in_is_written(tmp_path, capsys):
    out = tmp_path / "vllm_step_log.py"
    main(["calibrate", "plugin", "--out", str(out)])
    assert "class StepLogScheduler" in out.read_text()
