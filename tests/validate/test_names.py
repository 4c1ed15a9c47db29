from __future__ import annotations

import pytest

from servegym.errors import ConfigError
from servegym.validate.names import (
    checkpoint_format,
    engine_family,
    known_gpu,
    known_model,
    known_precision,
)


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("RTX4090", "RTX-4090"),
        ("RTXPRO6000", "RTX-PRO-6000"),
        ("h100_sxm", "H100-SXM-80GB"),
        ("NVIDIA H200-SXM-141GB", "H200-SXM-141GB"),
        ("A100-80GB", "A100-SXM-80GB"),
    ],
)
def test_gpu_labels_name_the_gpu_they_stand_for(label, name):
    assert known_gpu(label) == name


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "Llama-3.1-8B"),
        ("meta-llama/Meta-Llama-3-8B", "Llama-3.1-8B"),
        ("meta-llama/Llama-2-7b-hf", "Llama-2-7B"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "Qwen3-30B-A3B"),
        ("Qwen/Qwen3-235B-A22B-FP8", "Qwen3-235B-A22B"),
        ("Llama-3.3-70B", "Llama-3.1-70B"),
    ],
)
def test_model_labels_name_the_architecture(label, name):
    assert known_model(label) == name


@pytest.mark.parametrize("label", ["Llama-3.1-8B-Vision", "llama", ""])
def test_model_label_is_refused_when_something_else_follows_the_name(label):
    with pytest.raises(ConfigError, match="unknown model"):
        known_model(label)


@pytest.mark.parametrize("label", ["H1", "GTX-1080", ""])
def test_gpu_label_is_refused_when_it_names_none_or_several(label):
    with pytest.raises(ConfigError, match="unknown GPU"):
        known_gpu(label)


def test_precisions_are_told_by_their_first_word():
    assert known_precision("fp16") == "bf16"
    assert known_precision("fp8 (assumed; declared fp16)") == "fp8"
    assert known_precision("nvfp4") == "fp4"
    with pytest.raises(ConfigError, match="int4_wo are not modelled"):
        known_precision("int4_wo")


@pytest.mark.parametrize(
    ("engine", "version", "gpu", "family"),
    [
        ("vLLM", "0.19.0", "H100", "vllm"),
        ("vLLM", "0.14.0", "H100", "vllm"),
        ("vLLM", "0.13.0", "H100", "vllm-sync"),
        ("vLLM", "0.8.5", "H100", "vllm-sync"),
        ("vLLM", "", "H100", "vllm"),
        ("vLLM", "2024 (vLLM 0.4-0.5, TRT-LLM 0.9-0.10 era)", "H100", "vllm-v0"),
        ("vLLM", "0.6.3", "MI300X", "vllm-v0-rocm"),
        ("TensorRT-LLM (PyTorch backend)", "1.0", "B200", "trtllm"),
        ("SGLang", "0.5.9", "H200", "sglang"),
    ],
)
def test_engine_families_part_by_engine_age_and_platform(engine, version, gpu, family):
    assert engine_family(engine, version, gpu) == family


@pytest.mark.parametrize(
    ("label", "model_label", "family", "expected"),
    [
        ("bf16", "meta-llama/Llama-3.1-8B", "vllm", "bf16"),
        ("fp8", "meta-llama/Llama-3.1-70B", "vllm", "fp8"),
        ("fp8", "nvidia/Llama-3.1-8B-Instruct-FP8", "vllm-sync", "fp8-static"),
        ("fp8", "meta-llama/Llama-3.1-70B", "trtllm", "fp8-static"),
        ("fp8_block", "meta-llama/Llama-3.1-8B-Instruct", "sglang", "fp8-block"),
        ("fp8", "Qwen/Qwen3-235B-A22B-FP8", "vllm-sync", "fp8-block"),
        ("fp8", "Qwen/Qwen3-32B", "trtllm", "fp8-static"),
        ("fp8", "deepseek-ai/DeepSeek-R1", "trtllm", "fp8-block"),
        ("nvfp4", "deepseek-ai/DeepSeek-R1", "trtllm", "fp4"),
    ],
)
def test_the_number_format_is_that_of_the_checkpoint_the_engine_serves(
    label, model_label, family, expected
):
    assert checkpoint_format(label, model_label, family) == expected
