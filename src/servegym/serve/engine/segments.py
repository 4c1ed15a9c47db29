"""Where the block names of the requests inside an engine lie."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from servegym.cluster.state import SEGMENT_DTYPE, State

#: Of a block's name: the core has negative ones for what is not numbered.
_NAME_BITS = (1 << 62) - 1


class Segments:
    """Rows of `State.segment`: one for each full KV block of each request.

    So no block is ever named after its request's place: whoever has the place next finds nothing
    that was not his. Rows are taken one after the other; when they are used up, those of requests
    that have left are closed up.

    Args:
        block_size: Tokens in a KV block.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._rows: dict[int, tuple[int, int]] = {}  # by place, in order of rows
        self._end = 0

    def rows(self, place: int) -> tuple[int, int]:
        """Return the first row of a request, and the one behind its last."""
        return self._rows[place]

    def add(self, state: State, place: int, names: Sequence[int]) -> State:
        """Write the names of a request's blocks; return the state, with other arrays if need be."""
        count = len(names)
        if self._end + count > state.segment.shape[1]:
            state = self._close_up(state, count)
        first, self._end = self._end, self._end + count
        rows = state.segment[0, first : self._end]
        # block j of its request is named `first_name + j`; the core numbers no texts here
        rows["first_name"] = ~(np.array(names, np.int64) & _NAME_BITS) - np.arange(count)
        rows["end"] = np.arange(1, count + 1) * self._block_size
        self._rows[place] = first, self._end
        return state

    def drop(self, place: int) -> None:
        """Free the rows of a request that has ended."""
        self._rows.pop(place, None)

    def _close_up(self, state: State, count: int) -> State:
        """Move the rows that are in use to the front, and have as many free ones behind them."""
        used = sum(stop - first for first, stop in self._rows.values())
        segment = np.zeros((1, max(2 * (used + count), state.segment.shape[1])), SEGMENT_DTYPE)
        self._end = 0
        for place, (first, stop) in self._rows.items():
            moved = self._end, self._end + stop - first
            segment[0, slice(*moved)] = state.segment[0, first:stop]
            state.request["segment_first"][0, place], state.request["segment_stop"][0, place] = (
                moved
            )
            self._rows[place], self._end = moved, moved[1]
        return state._replace(segment=segment)
