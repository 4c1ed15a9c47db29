"""What followed what in a router's log: rows name the request whose answer came before them."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, cast, get_args

import numpy as np

from servegym.errors import WorkloadError
from servegym.typing import FloatArray, Int32Array
from servegym.workloads.table import BY_ITSELF

#: How it is known: the client named the session, or the prompt goes on from an earlier one.
By = Literal["session", "prefix"]
#: A row with the name of the one followed is taken for it if it ends within so many seconds of
#: when that ended, and this share of the time between: clocks of the wall are set at times.
_SAME_END_S = 1.0
_SAME_END_SHARE = 1e-3
#: Rows of one name that end before or after then, and are looked at.
_NEAR = 4
_FAR_S = 1e18  # integers of JSON have no end


class Followed(NamedTuple):
    """The request that another came after.

    Attributes:
        key: Its name in the log.
        delay_s: From its end to the arrival of the other.
        by: How that is known.
    """

    key: str
    delay_s: float
    by: By


class Links(NamedTuple):
    """Who waits for whom, as the columns of a `RequestTable`.

    Attributes:
        after: `int32[n]`.
        delay_s: `float64[n]`; also of requests that follow one which is not there.
        num_by: Requests that wait for an answer, by how it is known.
        num_cut: Requests whose predecessor is not there: they come by themselves.
    """

    after: Int32Array
    delay_s: FloatArray
    num_by: dict[By, int]
    num_cut: int

    @property
    def num_waiting(self) -> int:
        """Requests that wait for an answer."""
        return sum(self.num_by.values())

    @property
    def sentence(self) -> str:
        """How many wait, and what says so."""
        by = self.num_by
        cut = f"; {self.num_cut:,} follow one that is not in it, and come by themselves"
        return (
            f"{self.num_waiting:,} of {len(self.after):,} requests wait for an answer:"
            f" {by['session']:,} by their session, {by['prefix']:,} as guessed from their prompts"
            + (cut if self.num_cut else "")
        )


def parse_followed(where: str, value: object) -> Followed | None:
    """Read the column `follows` of a row.

    Args:
        where: Names the row in errors.
        value: `None` where the row follows none, or its log does not say.

    Raises:
        WorkloadError: If it is malformed.
    """
    if value is None:
        return None
    if isinstance(value, dict):
        key, delay_s, by = value.get("key"), value.get("delay_s"), value.get("by")
        seconds = -1.0
        if isinstance(delay_s, int | float) and not isinstance(delay_s, bool):
            seconds = float(delay_s) if 0 <= delay_s < _FAR_S else -1.0
        if isinstance(key, str) and seconds >= 0.0 and by in ("session", "prefix"):
            return Followed(key, seconds, cast("By", by))
    raise WorkloadError(
        f"{where}, column follows: {value!r} must be null, or have key, delay_s from 0 and by,"
        f" one of {', '.join(get_args(By))}"
    )


def link_followed(
    keys: Sequence[str],
    arrival_s: FloatArray,
    end_s: FloatArray,
    followed: Sequence[Followed | None],
) -> Links:
    """Find the rows that rows follow.

    Names need not be unique, for clients may give them: of several rows, that counts which ended
    when the one followed did.

    Args:
        keys: Names of the rows, in order of arrival.
        arrival_s: On the wall clock, `float64[n]`.
        end_s: Likewise, NaN of rows that have not finished, `float64[n]`.
        followed: By each.
    """
    named: dict[str, list[tuple[float, int]]] = {one.key: [] for one in followed if one}
    for i, (key, time_s) in enumerate(zip(keys, end_s.tolist(), strict=True)):
        if key in named and time_s >= 0.0:
            named[key].append((time_s, i))
    for ends in named.values():
        ends.sort()
    after = np.full(len(keys), BY_ITSELF, np.int32)
    delay_s = np.zeros(len(keys))
    num_by: dict[By, int] = dict.fromkeys(get_args(By), 0)
    num_cut = 0
    for i, one in enumerate(followed):
        if one is None:
            continue
        delay_s[i] = one.delay_s
        then_s = float(arrival_s[i]) - one.delay_s
        ends = named[one.key]
        at = bisect.bisect(ends, (then_s, i))
        near = ends[max(0, at - _NEAR) : at + _NEAR]
        away_s, place = min(
            ((abs(time_s - then_s), j) for time_s, j in near if j < i),
            default=(math.inf, BY_ITSELF),
        )
        passed_s = arrival_s[i] - arrival_s[place]
        if away_s <= _SAME_END_S + _SAME_END_SHARE * passed_s:
            after[i] = place
            num_by[one.by] += 1
        else:
            num_cut += 1
    return Links(after, delay_s, num_by, num_cut)
