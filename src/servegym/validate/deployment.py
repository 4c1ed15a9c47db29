"""Workers of published rows in which some only prefill and others only decode.

The dump of InferenceX in AIConfigurator's sample holds such runs twice: once with the number of
workers, once without. A row that does not say it has a twin that does if it is the same
measurement, equal to the last digit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from servegym.errors import ConfigError
from servegym.validate.degrees import Degrees

_POOLS = re.compile(
    r"p=(\d*)x\(tp(\d+),dp(\d+),ep(\d+)\) d=(\d*)x\(tp(\d+),dp(\d+),ep(\d+)\)", re.IGNORECASE
)
_COUNTS = re.compile(r"\b(\d+)p(\d+)d\b", re.IGNORECASE)
_EACH = re.compile(r"\btp=(\d+) per worker|\btp(\d+)\+tp(\d+)\b", re.IGNORECASE)
#: What a twin has in common.
_SAME = ("file", "isl", "osl", "concurrency", "ttft_mean", "tpot_mean")


@dataclass(frozen=True)
class Pool:
    """Equal workers.

    Attributes:
        count: How many.
        degrees: How each spreads the model.
    """

    count: int
    degrees: Degrees

    @property
    def num_gpus(self) -> int:
        """GPUs of all of them."""
        return self.count * self.degrees.tp * self.degrees.ranks


@dataclass(frozen=True)
class Deployment:
    """Workers that prefill, and workers that decode."""

    prefill: Pool
    decode: Pool


def is_disaggregated(notes: str) -> bool:
    """Whether a row's notes say that some workers only prefill."""
    return "disagg" in notes.lower() or _COUNTS.search(notes) is not None


def deployment(text: dict[str, str]) -> Deployment:
    """Read the workers of a disaggregated row.

    Args:
        text: All cells of the row; `twin` may hold the notes of its twin.

    Raises:
        ConfigError: If it says nothing clear, or what the simulator lacks.
    """
    found = _POOLS.search(text["notes"])
    if found is not None and not (found[1] and found[5]):
        found = _POOLS.search(text.get("twin", ""))
        if found is None:
            raise ConfigError("disaggregated over a number of workers that is not given")
        return Deployment(_pool(found[1], *found.groups()[1:4]), _pool(*found.groups()[4:]))
    if found is not None:
        both = Deployment(_pool(found[1], *found.groups()[1:4]), _pool(*found.groups()[4:]))
    else:
        counts, each = _COUNTS.search(text["notes"]), _EACH.search(text["notes"])
        if counts is None or each is None:
            raise ConfigError("disaggregated over workers that are not described")
        own, other = each[1] or each[2], each[1] or each[3]
        both = Deployment(_pool(counts[1], own), _pool(counts[2], other))
    gpus = both.prefill.num_gpus + both.decode.num_gpus
    if text["gpu_count"].isdigit() and int(text["gpu_count"]) not in (0, gpus):
        raise ConfigError(f"{text['gpu_count']} GPUs for workers of {gpus}: parallelism not clear")
    return both


def _pool(count: str, tp: str, dp: str = "1", ep: str = "1") -> Pool:
    if int(count) < 1:
        raise ConfigError("disaggregated without workers of one kind")
    if int(dp) == 1:
        return Pool(int(count), Degrees(int(tp), expert_groups=int(ep)))
    if int(tp) > 1:
        raise ConfigError("data-parallel attention over tensor-parallel ranks")
    # with experts split by tensor or by expert parallelism: both hold a share and exchange tokens
    return Pool(int(count), Degrees(1, ranks=int(dp)))


def twins(rows: Sequence[dict[str, str]]) -> list[str]:
    """Return for each row the notes of one that is the same measurement with its workers given.

    Args:
        rows: All cells of all rows.

    Returns:
        Empty where there is none.
    """
    stated = {}
    for text in rows:
        found = _POOLS.search(text["notes"])
        if found is not None and found[1] and found[5]:
            stated[tuple(text.get(name, "") for name in _SAME)] = text["notes"]
    return [stated.get(tuple(text.get(name, "") for name in _SAME), "") for text in rows]
