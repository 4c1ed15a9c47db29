"""Settings of an engine that the notes of a published row state."""

from __future__ import annotations

import re
from dataclasses import dataclass

_BLOCKS = re.compile(r"\bkv blocks[= ](\d+)x(\d+)", re.IGNORECASE)
_FRACTION = re.compile(
    r"\b(?:gpu[-_]memory[-_]utilization|mem[-_]fraction[-_]static)[= ](0?\.\d+|1(?:\.0*)?)\b",
    re.IGNORECASE,
)
_ON, _OFF = ("true", "on", "enabled"), ("false", "off", "disabled")


@dataclass(frozen=True)
class StatedLimits:
    """What a row's notes say of its engine; None: nothing.

    Attributes:
        max_num_seqs: Running requests.
        max_num_batched_tokens: Token budget of a step.
        num_blocks: KV blocks.
        block_size: Tokens of one.
        memory_fraction: Share of GPU memory the engine may use.
        chunked_prefill: Whether prompts are split over steps.
        prefix_caching: Whether KV of equal prefixes is used again.
    """

    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    num_blocks: int | None = None
    block_size: int | None = None
    memory_fraction: float | None = None
    chunked_prefill: bool | None = None
    prefix_caching: bool | None = None


def stated_limits(notes: str) -> StatedLimits:
    """Read the settings that the notes of a row state, by their names in vLLM and SGLang.

    Args:
        notes: As collected; what is not written as `name=value` or `name value` says nothing.
    """
    blocks, fraction = _BLOCKS.search(notes), _FRACTION.search(notes)
    return StatedLimits(
        max_num_seqs=_number("max_num_seqs", notes),
        max_num_batched_tokens=_number("max_num_batched_tokens", notes),
        num_blocks=int(blocks[1]) if blocks else None,
        block_size=int(blocks[2]) if blocks else None,
        memory_fraction=float(fraction[1]) if fraction else None,
        chunked_prefill=_switch("chunked_prefill", notes),
        prefix_caching=_switch("prefix_caching", notes),
    )


def _number(name: str, notes: str) -> int | None:
    found = re.search(rf"(?<![a-z]){name}[= ](\d+)", notes.replace("-", "_"), re.IGNORECASE)
    return int(found[1]) if found else None


def _switch(name: str, notes: str) -> bool | None:
    words = "|".join((*_ON, *_OFF))
    written = notes.lower().replace(name.replace("_", " "), name).replace("-", "_")
    found = re.search(rf"(?<![a-z]){name}[= ]({words})\b", written)
    return found[1] in _ON if found else None
