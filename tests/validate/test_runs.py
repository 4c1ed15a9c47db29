from __future__ import annotations

import numpy as np
import pytest

from servegym.errors import ConfigError, WorkloadError
from servegym.validate.runs import read_runs


def test_run_is_read_with_its_settings_and_arrivals_from_0(write_run):
    folder = write_run(tensor_parallel_size=2)
    (folder / "notes.txt").write_text("not a run")
    (run,), rest = read_runs(folder)
    assert (run.gpu, run.model, run.precision, run.tp) == ("RTX-4090", "Llama-3.1-8B", "bf16", 2)
    assert (run.max_num_seqs, run.num_blocks, run.memory_fraction) == (8, 500, 0.9)
    np.testing.assert_allclose(run.arrival_s, [0, 1, 2])
    np.testing.assert_allclose(run.tpot_s, 0.05)  # 0.5 s for the ten tokens after the first
    assert [name for name, _ in rest] == ["notes.txt"]


def test_folder_is_refused_when_missing_or_without_runs(tmp_path):
    with pytest.raises(ConfigError, match="no folder at"):
        read_runs(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no run in"):
        read_runs(tmp_path)


def test_run_is_refused_when_gpu_or_model_is_unknown(write_run):
    with pytest.raises(ConfigError, match="unknown GPU 'GTX1080'"):
        read_runs(write_run(gpu="GTX1080"))


def test_run_is_refused_when_its_model_is_unknown(write_run):
    with pytest.raises(ConfigError, match="unknown model 'BERT'"):
        read_runs(write_run(model="BERT"))


def test_run_is_refused_when_its_requests_are_missing(write_run):
    folder = write_run()
    (folder / "vllm019_RTX4090_toy_requests.csv.gz").unlink()
    with pytest.raises(WorkloadError, match="toy_requests"):
        read_runs(folder)


def test_run_is_refused_when_its_description_is_damaged(write_run):
    folder = write_run()
    (folder / "vllm019_RTX4090_toy_meta.json").write_text("{}")
    with pytest.raises(WorkloadError, match="engine_kwargs"):
        read_runs(folder)
