"""Folders with the configuration of a checkpoint, as peers read them; runs beside the peers."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

#: What a checkpoint's `config.json` says of weights in a number format.
QUANTIZATION = {
    "bf16": {},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "fp8-static": {"quant_method": "fp8", "activation_scheme": "static"},
    "fp8-block": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
    "fp4": {"quant_algo": "NVFP4", "quant_method": "modelopt"},
}


def described(
    config: dict[str, Any], quantized: dict[str, Any] | None, weights: str, fp8_kv: bool
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return both configurations of a checkpoint with other weights and another KV cache.

    Args:
        config: Its `config.json`.
        quantized: Its `hf_quant_config.json`, None if it has none.
        weights: Number format; empty: its own.
        fp8_kv: Whether the KV cache is kept in fp8.
    """
    kv = "FP8" if fp8_kv else "BF16"  # AISimulate takes FP8 with quantized weights all the same
    if quantized is not None and not weights:
        section = quantized["quantization"] | {"kv_cache_quant_algo": kv}
        return config, quantized | {"quantization": section}
    own = QUANTIZATION[weights] if weights else config.get("quantization_config", {})
    section = {name: value for name, value in own.items() if name != "kv_cache_scheme"}
    if section or fp8_kv:
        section["kv_cache_quant_algo"] = kv
    config = {name: value for name, value in config.items() if name != "quantization_config"}
    return (config | {"quantization_config": section} if section else config), None


def folder_of(piece: dict[str, Any], work: Path) -> Path:
    """Make the folder that describes the checkpoint of a piece of work, unless it is there."""
    kv = "fp8" if piece["fp8_kv"] else "16"
    label = piece["checkpoint"].replace("/", "--")
    folder = work / f"{label}-{piece['weights'] or 'own'}-kv{kv}"
    if folder.is_dir():
        return folder
    shipped = files("aiconfigurator_core") / "model_configs"
    config = json.loads((shipped / f"{label}_config.json").read_text())
    beside = shipped / f"{label}_hf_quant_config.json"
    quantized = json.loads(beside.read_text()) if beside.is_file() else None
    both = described(config, quantized, piece["weights"], piece["fp8_kv"])
    folder.mkdir(parents=True)
    for name, content in zip(("config.json", "hf_quant_config.json"), both, strict=True):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder
