"""Rows of a trace that wait for others: whom they mean, and when they come at the earliest."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from servegym.errors import WorkloadError
from servegym.typing import BoolArray, IntArray
from servegym.workloads.cells import finite, whole
from servegym.workloads.table import BY_ITSELF

_INT32_MAX = 2**31 - 1
#: Recorded times are rounded: one that is earlier than it can be by no more is no contradiction.
_ROUNDED_S = 1e-3
_WHOLE_FLOAT = re.compile(r"-?[0-9]+\.0")


class Wait(NamedTuple):
    """What a row of a trace says of itself and of the one that it waits for.

    Attributes:
        where: File and line, for messages.
        file: Its name: row numbers count within it.
        number: Row of the file, from 0, without its header.
        row_id: What others call it, "" if it has no id.
        after: As it stands there, "" if the request arrives by itself.
        delay_s: From the end of that one to its arrival.
    """

    where: str
    file: str
    number: int
    row_id: str = ""
    after: str = ""
    delay_s: float = 0.0


class Linked(NamedTuple):
    """Rows with those that they wait for found.

    Attributes:
        after: Position of that row, `BY_ITSELF` if there is none.
        time_s: Arrival, or the earliest possible one where the row has none: if all answers took
            no time.
        depth: How many rows must end before it, one after the other.
        wrong: What is wrong with a row, "" if nothing is.
    """

    after: list[int]
    time_s: list[float]
    depth: list[int]
    wrong: list[str]


def read_wait(where: str, file: str, number: int, row: Mapping[str, object]) -> Wait:
    """Read the columns `id`, `after` and `delay_s` of a row, each of which may be missing.

    Raises:
        WorkloadError: If the delay is no time, or is one after nobody; or if the row has neither
            an arrival nor one that it waits for.
    """
    row_id = _name(row["id"]) if "id" in row else ""
    if "after" not in row and "delay_s" not in row:
        return Wait(where, file, number, row_id)
    after = _name(row.get("after"))
    delay = row.get("delay_s")
    delay_s = 0.0 if _name(delay) == "" else finite(where, "delay_s", delay)
    if delay_s < 0:
        raise WorkloadError(f"{where}, column delay_s: {delay!r} must be at least 0")
    if delay_s and not after:
        raise WorkloadError(
            f"{where}: delay_s is {delay_s:g}, but after is empty: name the row at whose end these"
            " seconds begin, or leave delay_s out"
        )
    if "after" in row and not after and _name(row.get("arrival_s")) == "":
        raise WorkloadError(
            f"{where}: arrival_s and after are both empty: give the time of a request that"
            " arrives by itself, or the row that it waits for"
        )
    return Wait(where, file, number, row_id, after, delay_s)


def _name(value: object) -> str:
    """Text of a cell; a whole number is the same with and without the fraction of a float."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = str(value).strip()
    return text[:-2] if _WHOLE_FLOAT.fullmatch(text) else text


def link_waits(waits: Sequence[Wait], time_s: Sequence[float], *, skip: bool = False) -> Linked:
    """Find whom the rows wait for.

    `after` names a row by its id if any row has one, else by its number in the file.

    Args:
        waits: What the rows say.
        time_s: Their arrivals, NaN for none.
        skip: Say what is wrong with rows instead of refusing the first of them. Whoever waits for
            such a row is wrong, too.

    Raises:
        WorkloadError: If two rows have one id, or a row waits for one that is not there, for
            itself, or in a circle, or arrives before it can.
    """
    n = len(waits)
    linked = Linked([BY_ITSELF] * n, list(time_s), [0] * n, [""] * n)

    def refuse(i: int, why: str) -> None:
        linked.wrong[i] = f"{waits[i].where}: {why}"
        if not skip:
            raise WorkloadError(linked.wrong[i])

    place: dict[str | tuple[str, int], int] = {}
    has_ids = any(wait.row_id for wait in waits)
    for i, wait in enumerate(waits):
        key = wait.row_id if has_ids else (wait.file, wait.number)
        if key and place.setdefault(key, i) != i:
            refuse(i, f"id {wait.row_id!r} is that of {waits[place[key]].where}, too: give others")
    for i, wait in enumerate(waits):
        if wait.after and not linked.wrong[i]:
            found = _whom(wait, place, has_ids)
            if isinstance(found, int):
                linked.after[i] = found
            else:
                refuse(i, found)
    done = [not wait.after or bool(linked.wrong[i]) for i, wait in enumerate(waits)]
    for i in range(n):
        way: list[int] = []
        at = i
        while not done[at] and len(way) <= n:
            way.append(at)
            at = linked.after[at]
        if len(way) > n:
            circle = _circle(linked.after, i)
            for one in circle:
                done[one] = True
                there = waits[linked.after[one]].where
                refuse(
                    one,
                    f"it waits for {there}, which waits for it: one of them must arrive by itself",
                )
            way = [one for one in dict.fromkeys(way) if one not in circle]
        for one in reversed(way):
            done[one] = True
            why = _later(linked, waits, one)
            if why:
                refuse(one, why)
    return linked


def _whom(wait: Wait, place: Mapping[str | tuple[str, int], int], has_ids: bool) -> int | str:
    """Position of the row that a row waits for, or why there is none."""
    if has_ids:
        if wait.after == wait.row_id:
            return f"after is its own id {wait.after!r}: leave it empty if it arrives by itself"
        if wait.after not in place:
            return (
                f"after is {wait.after!r}, and no row has that id: leave it empty if it arrives by"
                " itself"
            )
        return place[wait.after]
    try:
        number = whole(wait.where, "after", wait.after, 0, _INT32_MAX)
    except WorkloadError as error:
        return str(error).removeprefix(f"{wait.where}, ") + ", the number of a row from 0 on"
    if number == wait.number:
        return f"after is its own row number {number}: leave it empty if it arrives by itself"
    if (wait.file, number) not in place:
        return f"after is row {number}, which is none of this file or was left out"
    return place[wait.file, number]


def _circle(after: Sequence[int], start: int) -> list[int]:
    """The rows of the circle that the way from a row ends in."""
    seen: dict[int, None] = {}
    at = start
    while at not in seen:
        seen[at] = None
        at = after[at]
    way = list(seen)
    return sorted(way[way.index(at) :])


def _later(linked: Linked, waits: Sequence[Wait], i: int) -> str:
    """Set time and depth of a row whose predecessor has them; say what is wrong, or nothing."""
    before = linked.after[i]
    if linked.wrong[before]:
        return f"it waits for a row that is left out ({linked.wrong[before]})"
    linked.depth[i] = linked.depth[before] + 1
    earliest_s = linked.time_s[before] + waits[i].delay_s
    given_s = linked.time_s[i]
    if given_s < earliest_s - _ROUNDED_S:
        return (
            f"arrival_s is {given_s:g}, but it waits for {waits[before].where}, which arrives at"
            f" {linked.time_s[before]:g}, and for {waits[i].delay_s:g} s more: leave arrival_s"
            " empty, or mend one of them"
        )
    linked.time_s[i] = earliest_s if math.isnan(given_s) else max(given_s, earliest_s)
    return ""


def with_followers(out: BoolArray, after: IntArray) -> BoolArray:
    """Mark who waits for a marked request, directly or by way of others, too.

    Args:
        out: Marks, `bool[n]`.
        after: Earlier request that each one waits for, negative for none, `int64[n]`.
    """
    marks = out.copy()
    if marks.any():
        for i in np.flatnonzero(after >= 0).tolist():
            marks[i] |= marks[after[i]]
    return marks
