"""Names of GPUs, models, precisions and engines as engines and papers write them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from servegym.assets.specs import gpu_names, model_names
from servegym.engines import EngineName
from servegym.errors import ConfigError, unknown_name

#: GPU labels that do not begin like the name in `assets/gpus.yaml`.
_GPUS = {
    "gb200": "GB200-192GB",
    "a10g24gb": "A10G",
    "h100": "H100-SXM-80GB",
    "h100nvl": "H100-NVL-94GB",
    "h200": "H200-SXM-141GB",
    "b200": "B200-SXM-180GB",
    "a100": "A100-SXM-80GB",
    "a10080gb": "A100-SXM-80GB",
    "a100sxm": "A100-SXM-80GB",
    "rtxpro6000bse": "RTX-PRO-6000",
    "rtxpro6000blackwellserveredition": "RTX-PRO-6000",
}
#: Models with the architecture (not the weights) of one in `assets/models.yaml`.
_MODELS = {
    "llama38b": "Llama-3.1-8B",
    "llama370b": "Llama-3.1-70B",
    "llama3370b": "Llama-3.1-70B",
    "llama7b": "Llama-2-7B",
    "gptj6b": "GPT-J-6B",
    "mistrallarge": "Mistral-Large-123B",
    "qwen2514b": "Qwen2.5-14B",
    "mistral7b": "Mistral-7B-v0.1",
    "mixtral8x7b": "Mixtral-8x7B",
    "qwen27b": "Qwen2.5-7B",
    "qwen272b": "Qwen2.5-72B",
    "deepseekv31": "DeepSeek-V3",
    "acemath7b": "Qwen2.5-7B",
    "deepseekr1distillllama8b": "Llama-3.1-8B",
    "deepseekr1distillqwen7b": "Qwen2.5-7B",
}
#: Engine family by a word in an engine's label; the first that occurs.
_FAMILIES = {
    "sglang": "sglang",
    "vllm": "vllm",
    "trtllm": "trtllm",
    "tensorrt": "trtllm",
    "tgi": "tgi",
    "deepspeed": "deepspeed",
}
#: Models that their makers publish in fp8 with scales a block, and in no other form of fp8.
_BLOCK_SCALED = ("DeepSeek-V3", "DeepSeek-R1", "MiniMax-M2.5")
#: Whose rules and kernels stand for an engine family, if not those of vLLM V1.
KERNELS: dict[str, EngineName] = {
    "vllm-v0": "vllm-v0",
    "sglang": "sglang",
    "trtllm": "trtllm",
}
#: What may follow a model's name without changing its architecture.
_VARIANT = re.compile(r"(instruct|chat|base|hf|it|v0\d|fp8|nvfp4|fp4|bf16|2507|quark|awq|gptq)*")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _known(label: str, names: Sequence[str], aliases: dict[str, str]) -> str | None:
    plain = _plain(label)
    if plain in aliases:
        return aliases[plain] if aliases[plain] in names else None
    exact = [name for name in names if _plain(name) == plain]
    return exact[0] if exact else None


def known_gpu(label: str) -> str:
    """Return the name in `assets/gpus.yaml` of a GPU label such as `RTX4090` or `h100_sxm`.

    Raises:
        ConfigError: If it names none of them, or several.
    """
    names = gpu_names()
    text = re.sub(r"(?i)^(nvidia|amd|instinct|geforce|\s)+", "", label)
    found = _known(text, names, _GPUS)
    if found is None and _plain(text) not in _GPUS:
        start = text.lower().replace("_", "-") + "-"  # h100_sxm of H100-SXM-80GB
        near = [name for name in names if name.lower().startswith(start)]
        found = near[0] if len(near) == 1 else None
    if found is None:
        raise ConfigError(unknown_name("GPU", label, names))
    return found


def known_model(label: str) -> str:
    """Return the name in `assets/models.yaml` with the architecture of a model label.

    Raises:
        ConfigError: If there is none.
    """
    names = model_names()
    text = re.sub(r"^(meta-)", "", label.split("/")[-1], flags=re.IGNORECASE)
    found = _known(text, names, _MODELS)
    if found is None:
        plain = _plain(text)
        candidates = {_plain(name): name for name in names}
        candidates |= {alias: name for alias, name in _MODELS.items() if name in names}
        for stem in sorted(candidates, key=len, reverse=True):
            if plain.startswith(stem) and _VARIANT.fullmatch(plain[len(stem) :]):
                return candidates[stem]
        raise ConfigError(unknown_name("model", label, names))
    return found


def known_precision(label: str) -> str:
    """Return `bf16`, `fp8` or `fp4`, the precisions of weights that step costs know.

    Raises:
        ConfigError: If weights of that precision cannot be simulated.
    """
    plain = label.strip().lower()
    if plain in ("bf16", "fp16", "bfloat16", "float16", "auto", "half", "bf16?", "fp16?"):
        return "bf16"
    for precision, starts in (("fp8", ("fp8",)), ("fp4", ("fp4", "nvfp4", "mxfp4"))):
        if plain.startswith(starts):
            return precision
    raise ConfigError(f"weights in {label or 'no stated precision'} are not modelled")


def checkpoint_format(label: str, model_label: str, family: str) -> str:
    """Return the number format of weights and activations, a name of `servegym.costs.formats`.

    fp8 has scales a block if the label says so, or if the maker of the model publishes it like
    that; scales that the checkpoint holds if it comes from NVIDIA's Model
    Optimizer, as all that TensorRT-LLM serves and NVIDIA publishes; else an engine computes them.

    Args:
        label: Of the precision.
        model_label: Of the model.
        family: Engine family.

    Raises:
        ConfigError: If weights of that precision cannot be simulated.
    """
    precision = known_precision(label)
    if precision != "fp8":
        return precision
    maker, _, name = model_label.lower().rpartition("/")
    published = maker == "qwen" and name.endswith("fp8")
    if "block" in label.lower() or published or known_model(model_label) in _BLOCK_SCALED:
        return "fp8-block"
    return "fp8-static" if family == "trtllm" or maker == "nvidia" else "fp8"


def engine_family(engine: str, version: str = "", gpu_label: str = "") -> str:
    """Return the engine family of an engine: `vllm`, `vllm-sync`, `vllm-v0`, `trtllm`, ...

    vLLM before V1 (2025) is a family of its own, and so is an engine on ROCm: their kernels
    and their work per step on the CPU have little in common with vLLM V1 on CUDA. So is V1 before
    0.14, which made scheduling beside the running step the default (vllm-project/vllm#27614).

    Args:
        engine: Its label.
        version: Its version or date.
        gpu_label: What it ran on.

    Raises:
        ConfigError: If the label names none of them.
    """
    plain = _plain(engine)
    family = next((family for mark, family in _FAMILIES.items() if mark in plain), None)
    if family is None:
        raise ConfigError(f"engine {engine!r} is none of {', '.join(_FAMILIES)}")
    if family == "vllm" and re.search(r"2024|^0\.[1-7]\.", version):
        family = "vllm-v0"
    elif family == "vllm" and re.match(r"0\.([89]|1[0-3])\.", version):
        family = "vllm-sync"
    return f"{family}-rocm" if re.match(r"(AMD|MI\d)", gpu_label) else family
