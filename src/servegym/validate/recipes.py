"""Settings of engines in InferenceX's scripts, where the published rows do not say them.

SemiAnalysisAI/InferenceX, `benchmarks/*.sh` and `benchmarks/single_node/*.sh`, as of the dates and
versions of the rows; what changed, and when, is in its `perf-changelog.yaml`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """What a script sets; None: nothing.

    Attributes:
        max_num_batched_tokens: Token budget of a step: `max_num_tokens` of TensorRT-LLM,
            `chunked-prefill-size` of SGLang.
        kv_precision: Of the KV cache.
    """

    max_num_batched_tokens: int | None = None
    kv_precision: str | None = None


def is_inferencex(text: dict[str, str]) -> bool:
    """Whether a row comes from InferenceX, by its notes."""
    return "inferencex" in text["notes"].lower()


def recipe(family: str, version: str, text: dict[str, str], model: str, tp: int) -> Recipe:
    """Return the settings of a row's script.

    Args:
        family: Engine family.
        version: Of the engine.
        text: All cells of the row.
        model: Known name of the model.
        tp: Tensor-parallel degree.
    """
    if not is_inferencex(text) or "disagg" in text["notes"].lower():
        return Recipe()
    if family == "trtllm":
        return Recipe(_trtllm_tokens(version, text, model))
    if family == "sglang" and model.startswith("DeepSeek"):
        return _sglang_deepseek(text, tp)
    return Recipe()


def _trtllm_tokens(version: str, text: dict[str, str], model: str) -> int | None:
    """Return `max_num_tokens`: there are no chunks, and a prompt must fit beside all decodes."""
    prompt, output = int(text["isl"]), int(text["osl"])
    clients = int(float(text["concurrency"]))
    if model.startswith("DeepSeek"):  # dsr1_*_trt.sh
        tokens = (clients + prompt + 127) // 64 * 64
        # later scripts have a least one; those for speculative decoding, with post3, have not
        return max(8192, tokens) if version.startswith("1.2.0rc6.post2") else tokens
    if model == "gpt-oss-120b":  # gptoss_fp4_*_trt.sh
        return 20_000
    if model == "Llama-3.1-70B":  # 70b_*_trt_slurm.sh; on H200 the longest context
        return 16_384 if text["gpu"].lower().startswith("b200") else prompt + output + 200
    return None


def _sglang_deepseek(text: dict[str, str], tp: int) -> Recipe:
    if text["gpu"].lower().startswith("h200"):  # dsr1_fp8_h200.sh
        return Recipe(32_768)
    if not text["gpu"].lower().startswith(("b200", "b300")):
        return Recipe()
    if not text["precision_w"].startswith("fp8"):  # dsr1_fp4_b200.sh, and b300
        return Recipe(16_384, "fp8")
    return Recipe(32_768 if tp == 8 else 8192, "fp8")  # dsr1_fp8_b200.sh, and b300
