"""How the blocks of a request's text are named: walking along its segments, forwards or back.

Block `j` of a segment is named `first_name + j` after it. Texts that requests share are numbered
from 1 on, so what is known of a block can be looked up without a search (`State.cached_on`). What
belongs to one request alone has negative names, and so has what a live engine names by its content.
"""

from __future__ import annotations

from servegym.cluster.jit import inlined, kernel
from servegym.cluster.state import Params, State
from servegym.typing import Int32Array, IntArray


@inlined
def private_names(request: int) -> int:
    """Where the names begin of what only this request (its index in the table) contains."""
    return -((request + 1) << 32)


@inlined
def segment_of(p: Params, s: State, e: int, request: int, j: int, seg: int) -> int:
    """The segment that names block `j` of a request, looked for from segment `seg` on."""
    stop, last_token = s.request[e, request].segment_stop, (j + 1) * p.block_size - 1
    while seg < stop and s.segment[e, seg].end <= last_token:
        seg += 1
    return seg


@inlined
def segment_before(p: Params, s: State, e: int, request: int, j: int, seg: int) -> int:
    """The same, looked for backwards from segment `seg`."""
    first, last_token = s.request[e, request].segment_first, (j + 1) * p.block_size - 1
    while seg > first and s.segment[e, seg - 1].end > last_token:
        seg -= 1
    return seg


@inlined
def identity_of(s: State, e: int, request: int, j: int, seg: int) -> int:
    """Name the content of block `j` of a request, which its segment `seg` names."""
    own = seg == s.request[e, request].segment_stop
    return (private_names(request) if own else s.segment[e, seg].first_name) + j


@inlined
def text_at(p: Params, s: State, e: int, request: int, j: int, seg: int) -> tuple[int, int, int]:
    """What names block `j` of a request, and those behind it, looked for from segment `seg` on.

    Returns:
        The segment; what the number of a block is added to for its name; the first block that has
        another segment.
    """
    seg = segment_of(p, s, e, request, j, seg)
    if seg == s.request[e, request].segment_stop:
        return seg, private_names(request), 1 << 31
    return seg, s.segment[e, seg].first_name, s.segment[e, seg].end // p.block_size


@kernel
def number_texts(
    keys: IntArray,
    ends: Int32Array,
    offsets: IntArray,
    num_blocks: IntArray,
    block_size: int,
    known: IntArray,
    ranges: IntArray,
    first_names: IntArray,
) -> int:
    """Number the blocks of all texts of a table from 1 on, in the order in which they appear.

    Args:
        keys: `RequestTable.prefix_keys`, m of them.
        ends: `RequestTable.prefix_ends`.
        offsets: `RequestTable.prefix_offsets`.
        num_blocks: Full blocks that each request comes to have, `int64[n]`.
        block_size: Tokens in a block.
        known: Working memory, `int64[H]`, H a power of 2 above m, all -1: a map from keys to the
            first segment with that key.
        ranges: Working memory, `int64[m, 3]`: that segment; of it, first block and the one behind
            the last that any segment with its key names.
        first_names: Written to, `int64[m]`; see `State.segment`.

    Returns:
        One more than the highest number.
    """
    mask = known.shape[0] - 1
    for i in range(offsets.shape[0] - 1):
        begin = 0
        for k in range(offsets[i], offsets[i + 1]):
            place = ((((keys[k] ^ (keys[k] >> 32)) & 0x7FFFFFFF) * 0x9E3779B1) >> 16) & mask
            while known[place] >= 0 and keys[known[place]] != keys[k]:
                place = (place + 1) & mask
            stop = min(num_blocks[i], ends[k] // block_size)
            if known[place] < 0:
                known[place] = k
                ranges[k, 1] = begin
                ranges[k, 2] = stop
            first = known[place]
            ranges[k, 0] = first
            ranges[first, 1] = min(ranges[first, 1], begin)
            ranges[first, 2] = max(ranges[first, 2], stop)
            begin = stop
    following = 1
    for k in range(keys.shape[0]):
        first = ranges[k, 0]
        if first == k:
            first_names[k] = following - ranges[k, 1]
            following += max(0, ranges[k, 2] - ranges[k, 1])
        else:
            first_names[k] = first_names[first]
    return following
