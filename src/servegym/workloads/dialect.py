"""What a trace's numbers count: the unit of its times and the tokens of a prefix hash."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import numpy as np

from servegym.errors import WorkloadError
from servegym.typing import BoolArray, FloatArray, IntArray

TimeUnit = Literal["s", "ms", "us", "ns"]
#: How many of each make a second.
PER_SECOND: dict[TimeUnit, float] = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
#: Of Mooncake's traces, a router's log and the native form.
BLOCK_TOKENS = 512
#: Block sizes that a file's own numbers can be recognised by.
_GUESSES = tuple(2**k for k in range(2, 14))


class Dialect(NamedTuple):
    """A convention about columns that do not say their unit.

    Attributes:
        name: Whose.
        time_column: Column of the arrivals.
        time_unit: Of that column; None: nobody knows.
        block_tokens: Tokens of a hash.
        hashed: What of a prompt has hashes: every block of it, the last, partial one too; leading
            blocks, of which there may be fewer; or blocks of a text whose tokens were estimated.
    """

    name: str
    time_column: str
    time_unit: TimeUnit | None
    block_tokens: int = BLOCK_TOKENS
    hashed: Literal["every", "leading", "estimated"] = "leading"


#: Times in seconds by the column's name, or dates.
NATIVE = Dialect("", "arrival_s", "s")
ROUTER = Dialect("a router's", "arrival_s", "s", hashed="estimated")
AZURE = Dialect("Azure's", "TIMESTAMP", "s")
BURSTGPT = Dialect("BurstGPT's", "Timestamp", "s")
MOONCAKE = Dialect("Mooncake's", "timestamp", "ms", hashed="every")
BAILIAN = Dialect("Qwen's Bailian", "timestamp", "s", block_tokens=16, hashed="every")


def dialect_of(time_column: str, prompt_column: str, columns: Collection[str]) -> Dialect:
    """Tell the dialect by the columns of a row."""
    if time_column == "arrival_s":
        return ROUTER if "decisions" in columns else NATIVE
    if time_column == "TIMESTAMP":
        return AZURE
    if time_column == "Timestamp" and prompt_column == "Request tokens":
        return BURSTGPT
    if time_column == "timestamp" and prompt_column == "input_length":
        return BAILIAN if "parent_chat_id" in columns else MOONCAKE
    return Dialect("", time_column, None)


class Units(NamedTuple):
    """What the numbers of a file count.

    Attributes:
        time_unit: Of its times.
        block_tokens: Tokens of a hash, None without hashes.
        fits: Rows whose number of hashes is that of their prompt, `bool[n]`.
        remarks: What was concluded, in sentences.
    """

    time_unit: TimeUnit
    block_tokens: int | None
    fits: BoolArray
    remarks: tuple[str, ...]


class Counts(NamedTuple):
    """What units are recognised by, a row of the file each.

    Attributes:
        time: As it stands there, `float64[n]`.
        prompt_tokens: `int64[n]`.
        num_hashes: `int64[n]`.
    """

    time: FloatArray
    prompt_tokens: IntArray
    num_hashes: IntArray


def units_of(
    name: str,
    dialect: Dialect,
    counts: Counts,
    places: Sequence[str],
    *,
    time_unit: TimeUnit | None = None,
    block_tokens: int | None = None,
    skip: bool = False,
) -> Units:
    """Find out what a file's numbers count, by its dialect, by the counts or by what is given.

    Args:
        name: Of the file.
        dialect: Of its columns.
        counts: Of its rows.
        places: File and line of each row, for messages.
        time_unit: If the user knows.
        block_tokens: Likewise, tokens of a hash.
        skip: Whether rows that do not fit may be left out.

    Raises:
        WorkloadError: If it cannot be known, or a row contradicts it.
    """
    remarks: list[str] = []
    fits = np.ones(len(places), np.bool_)
    block = None
    if counts.num_hashes.any():
        block, fits, said = _block(name, dialect, counts, places, block_tokens, skip)
        remarks += said
    elif block_tokens is not None:
        raise WorkloadError(
            f"{name} has no hashes of prefixes: leave hash_block_tokens (--hash-block-tokens) out"
        )
    own = block in (None, dialect.block_tokens)
    unit, said = _unit(name, dialect, counts, places, time_unit, block)
    if dialect is BAILIAN and own and time_unit is None:
        said = [
            f"{name} is read as one of Qwen's Bailian traces: timestamp in seconds"
            + ("" if block is None else f", {block} tokens a hash")
        ]
    elif dialect is MOONCAKE and block is None and time_unit is None:
        said = [
            f"{name}: timestamp is read in milliseconds, as in Mooncake's traces;"
            " --time-unit s if it counts seconds"
        ]
    return Units(unit, block, fits, (*remarks, *said))


def _block(
    name: str,
    dialect: Dialect,
    counts: Counts,
    places: Sequence[str],
    given: int | None,
    skip: bool,
) -> tuple[int, BoolArray, list[str]]:
    """Tokens of a hash, which rows agree, and what was concluded."""
    usual = given or dialect.block_tokens
    fits = _fits(dialect.hashed, counts, usual)
    if fits.all():
        return usual, fits, []
    best = usual
    if given is None:
        # rows must be covered from end to end to tell a size
        agree = {block: _fits("every", counts, block) for block in _GUESSES}
        whole = [block for block in _GUESSES if agree[block].all()]
        if len(whole) == 1:
            said = f"{name}: a hash covers {whole[0]} tokens, which all of its counts fit"
            return whole[0], agree[whole[0]], [said]
        likely = max(_GUESSES, key=lambda block: int(agree[block].sum()))
        if agree[likely].sum() > max(fits.sum(), len(fits) // 2):
            best, fits = likely, agree[likely]
    if skip and fits.sum() > len(fits) // 2:
        said = f"{name}: a hash covers {best} tokens, which most of its counts fit"
        return best, fits, [said] if best != usual else []
    row = int(np.argmin(fits))
    tokens, got = int(counts.prompt_tokens[row]), int(counts.num_hashes[row])
    most = "" if dialect.hashed == "every" else "at most "
    raise WorkloadError(
        f"{places[row]}: {got:,} hashes for a prompt of {tokens:,} tokens, but at {best} tokens a"
        f" hash it has {most}{-(-tokens // best):,}: say how many tokens a hash covers with"
        " hash_block_tokens (--hash-block-tokens), or mend the row"
    )


def _fits(hashed: str, counts: Counts, block: int) -> BoolArray:
    if hashed == "estimated":
        return np.ones(len(counts.num_hashes), np.bool_)
    blocks = -(-counts.prompt_tokens // block)
    fits = counts.num_hashes == blocks if hashed == "every" else counts.num_hashes <= blocks
    return np.asarray(fits, np.bool_)


def _unix_unit(time: float) -> TimeUnit | None:
    """Unit of a time since 1970, if it is one of the years 2001 to 2286."""
    return next((u for u, per_s in PER_SECOND.items() if 1e9 <= time / per_s < 1e10), None)


def _unit(
    name: str,
    dialect: Dialect,
    counts: Counts,
    places: Sequence[str],
    given: TimeUnit | None,
    block: int | None,
) -> tuple[TimeUnit, list[str]]:
    """Unit of the times, and what was concluded."""
    if given is not None:
        if dialect.time_column == "arrival_s" and given != "s":
            raise WorkloadError(
                f"{name} has its times in arrival_s, seconds by its name: leave time_unit"
                f" (--time-unit {given}) out, or rename the column"
            )
        return given, []
    why = ""
    since_1970 = _unix_unit(float(counts.time.min()))
    if dialect is AZURE:
        pass  # dates say all
    elif since_1970 and dialect.time_unit and since_1970 != dialect.time_unit:
        row = int(np.argmin(counts.time))
        why = (
            f"{places[row]}: {dialect.time_column} {counts.time[row]:.0f} looks like {since_1970}"
            f" since 1970, not like {dialect.time_unit}"
        )
        if dialect.time_column == "arrival_s":
            raise WorkloadError(f"{why}: write seconds, or rename the column to timestamp")
    elif dialect.time_unit is None:
        why = f"{name}: column {dialect.time_column} does not say what it counts"
    elif dialect.time_column == "timestamp":
        fraction = counts.time != np.floor(counts.time)
        if block not in (None, dialect.block_tokens):
            row = int(np.argmin(_fits(dialect.hashed, counts, dialect.block_tokens)))
            why = (
                f"{places[row]}: {counts.num_hashes[row]:,} hashes for a prompt of"
                f" {counts.prompt_tokens[row]:,} tokens make {block} tokens a hash, but"
                f" {dialect.name} traces, whose columns these are, have {dialect.block_tokens}, so"
                f" that timestamp may not count {dialect.time_unit} either"
            )
        elif dialect.time_unit == "ms" and fraction.any():
            row = int(np.argmax(fraction))
            why = (
                f"{places[row]}: timestamp {counts.time[row]:g} is no whole number of milliseconds,"
                f" as {dialect.name} are"
            )
    if why:
        span = float(np.ptp(counts.time))
        rates = ""
        if span > 0:
            slow = (len(counts.time) - 1) / span
            rates = f" (s: {slow:,.4g} requests/s, ms: {1000 * slow:,.4g} requests/s)"
        raise WorkloadError(f"{why}: give the unit, time_unit (--time-unit) s, ms, us or ns{rates}")
    assert dialect.time_unit is not None
    return dialect.time_unit, []
