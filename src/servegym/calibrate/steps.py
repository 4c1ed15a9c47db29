"""The log of an engine's steps, as a CSV file."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from servegym.errors import ConfigError, WorkloadError
from servegym.typing import FloatArray, IntArray
from servegym.workloads.cells import number
from servegym.workloads.records import columns_of, csv_records, file_text

#: Columns of the file; the last may be missing.
COLUMNS = ("prefill_tokens", "decode_sequences", "kv_tokens", "duration_s", "prefill_pairs")


@dataclass(frozen=True)
class Steps:
    """Steps of a running engine.

    Attributes:
        prefill_tokens: Prompt tokens computed, `float64[N]`.
        decode_sequences: Sequences that decoded a token, `float64[N]`.
        kv_tokens: These attended to in all, their new ones included, `float64[N]`.
        duration_s: `float64[N]`.
        prefill_pairs: Pairs of a prompt token and one it attended to, `float64[N]`, or None.
    """

    prefill_tokens: FloatArray
    decode_sequences: FloatArray
    kv_tokens: FloatArray
    duration_s: FloatArray
    prefill_pairs: FloatArray | None = None

    def __len__(self) -> int:
        return len(self.duration_s)

    def __getitem__(self, index: IntArray | npt.NDArray[np.bool_]) -> Steps:
        """Some of the steps."""
        pairs = self.prefill_pairs
        return Steps(
            self.prefill_tokens[index],
            self.decode_sequences[index],
            self.kv_tokens[index],
            self.duration_s[index],
            None if pairs is None else pairs[index],
        )

    @property
    def prefill_context(self) -> FloatArray:
        """Cached tokens before each step's prompt tokens, as if these were of one request."""
        if self.prefill_pairs is None:
            return np.zeros(len(self))
        prompt = self.prefill_tokens
        seen = self.prefill_pairs / np.maximum(prompt, 1.0)
        return np.maximum(seen - 0.5 * (prompt + 1.0), 0.0) * (prompt > 0)

    def require_both_phases(self) -> None:
        """Refuse a log from which the cost of a prefill or of a decode cannot be known.

        Raises:
            ConfigError: If fewer than five steps have the one or the other.
        """
        for count, what in (
            (np.count_nonzero(self.prefill_tokens), "prompt tokens"),
            (np.count_nonzero(self.decode_sequences), "decoding sequences"),
        ):
            if count < 5:
                raise ConfigError(
                    f"only {count} steps of the log have {what}: log at least 5 of them"
                )


def read_steps(path: Path) -> Steps:
    """Read a step log.

    Raises:
        ConfigError: If it is no CSV file with the columns, a row has not as many fields as the
            header, or a value is not a number.
    """
    try:
        text = file_text(path)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error):
        raise ConfigError(f"{path} is not a readable CSV file with a step log") from None
    rows: list[tuple[str, dict[str, object]]] = []
    try:
        for line, record in csv_records(path.name, text):
            where = f"{path}, line {line}"
            rows.append((where, columns_of(where, record)))
    except WorkloadError as error:
        raise ConfigError(str(error)) from error
    if not rows:
        raise ConfigError(f"{path} holds no steps")
    names = rows[0][1]
    missing = [name for name in COLUMNS[:4] if name not in names]
    if missing:
        raise ConfigError(
            f"{path} has no column {missing[0]}: a step log has {', '.join(COLUMNS[:4])}"
        )
    return Steps(
        **{
            name: np.array([_value(where, name, row[name]) for where, row in rows])
            for name in COLUMNS
            if name in names
        }
    )


def _value(where: str, name: str, text: object) -> float:
    try:
        value = number(where, name, text)
    except WorkloadError:
        value = np.nan
    if not np.isfinite(value) or value < 0 or (name == "duration_s" and value == 0):
        allowed = "above 0" if name == "duration_s" else "from 0"
        raise ConfigError(f"{where}: {name} must be a number {allowed}, got {text!r}")
    return value
