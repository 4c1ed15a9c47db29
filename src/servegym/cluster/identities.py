"""How the blocks of a request's text are named: walking along its segments, forwards or back."""

from __future__ import annotations

from servegym.cluster.jit import inlined
from servegym.cluster.rng import block_identity, private_key
from servegym.cluster.state import Params, State


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
    return block_identity(private_key(request) if own else s.segment[e, seg].key, j)
