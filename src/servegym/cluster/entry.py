"""Entry points: kernels that are compiled once, and called by others through their addresses.

A Numba function that calls another one contains it: what the main loop comprises would be compiled
anew into each of its callers. An entry point is compiled by itself; its callers find its address in
`Params.entries`, which `addresses` fills before anything runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import lower_builtin

from servegym.cluster.by_reference import load_field
from servegym.cluster.jit import kernel
from servegym.typing import IntArray

_F = TypeVar("_F", bound=Callable[..., object])

#: Places in `Params.entries`. Compiled code on disk holds them: a new entry point goes to the end.
(
    ADVANCE,
    APPLY,
    FORM_STEP,
    END_STEP,
    FORM_BY_PRIORITY,
    PREFIX_HIT_TOKENS,
    FORM_PHASE,
    STEP_TOGETHER,
    CATCH_UP,
    LET_GO,
    HAND_OVER,
    FIND_PLACE,
    PLACE_ON,
    SET_ASIDE,
    ADMIT_LANDED,
    GO_OFF_TRANSFER,
    STOP_TRANSFERS,
    INFER,
    ADMIT_APART,
    SEE_ROLES,
    GO_OFF_MIGRATION,
    MIGRATE_REQUEST,
    LEAVE,
    STOP_MIGRATIONS,
    STORE_TEXT,
    RESET_TIERS,
    LOSE_HOST,
    ADMIT_BESIDE_LOADS,
    LAND_LOAD,
    STOP_LOADS,
    SETTLE_TURN,
    SEE_MOVES,
    ANSWER_MOVE,
    SEE_TURN,
    SEE_TIERS,
    FORM_BATCHES,
    LAND_BATCH,
    SEE_PREFIXES,
) = range(38)
NUM_ENTRIES = 38
#: What only clusters call in which requests are prefilled on one replica and decode on another.
DISAGGREGATION = frozenset(
    {
        HAND_OVER,
        FIND_PLACE,
        PLACE_ON,
        SET_ASIDE,
        ADMIT_LANDED,
        ADMIT_APART,
        GO_OFF_TRANSFER,
        STOP_TRANSFERS,
    }
)
#: What only clusters call whose requests migrate.
MIGRATION = frozenset(
    {ADMIT_LANDED, ADMIT_APART, GO_OFF_MIGRATION, MIGRATE_REQUEST, LEAVE, STOP_MIGRATIONS}
)
#: What only clusters call that have tiers behind their KV blocks.
TIERS = frozenset({STORE_TEXT, RESET_TIERS, LOSE_HOST, ADMIT_BESIDE_LOADS, LAND_LOAD, STOP_LOADS})
#: What only replicas call whose layers are split over the stages of a pipeline.
PIPELINE = frozenset({FORM_BATCHES, LAND_BATCH})
#: Those that are compiled only for who asks for them: the others' first start is not to wait.
ON_DEMAND = (
    frozenset({INFER, SEE_ROLES, SETTLE_TURN, SEE_MOVES, ANSWER_MOVE, SEE_TURN, SEE_TIERS})
    | DISAGGREGATION
    | MIGRATION
    | TIERS
    | PIPELINE
)

_compiled: dict[int, tuple[Any, types.Type, tuple[types.Type, ...]]] = {}


def entry(place: int, result: types.Type, *arguments: types.Type) -> Callable[[_F], _F]:
    """Make a function of (params, state, *arguments) an entry point.

    Args:
        place: Where its address stands in `Params.entries`.
        result: Numba's type of what it returns.
        arguments: And of what it takes.
    """

    def make(function: _F) -> _F:
        compiled = kernel(function)
        _compiled[place] = (compiled, result, arguments)

        @functools.wraps(function)
        def face(*values: object) -> object:
            return compiled(*values)

        class _Typing(AbstractTemplate):
            key = face

            def generic(self, args: tuple[types.Type, ...], kws: object) -> Any:
                return signature(result, args[0], args[1], *arguments)

        infer_global(face, types.Function(_Typing))

        @lower_builtin(face, types.VarArg(types.Any))  # type: ignore[untyped-decorator]
        def _call(context: Any, builder: Any, sig: Any, args: tuple[Any, ...]) -> Any:
            params = sig.args[0]
            entries = load_field(context, builder, params, args[0], "entries")
            array = context.make_array(params.target.types[params.target.fields.index("entries")])
            data = array(context, builder, entries).data
            address = builder.load(cgutils.gep_inbounds(builder, data, place))
            address.set_metadata("invariant.load", builder.module.add_metadata([]))
            kind = ir.FunctionType(
                context.get_value_type(result), [context.get_value_type(a) for a in sig.args]
            )
            return builder.call(builder.inttoptr(address, kind.as_pointer()), args)

        made: Any = face
        return made

    return make


@functools.cache
def addresses(
    params: types.Type, state: types.Type, on_demand: frozenset[int] = frozenset()
) -> IntArray:
    """Compile entry points, or load them from disk; return their addresses.

    Args:
        params: Numba's type of the constants.
        state: And of the state.
        on_demand: Those of `ON_DEMAND` that are wanted; the address of others is 0.
    """
    found = np.zeros(NUM_ENTRIES, np.int64)
    if config.DISABLE_JIT:  # type: ignore[attr-defined]
        found[list(on_demand)] = 1  # nobody calls it, but it is there
        return found
    for place, (compiled, result, arguments) in _compiled.items():
        if place in ON_DEMAND and place not in on_demand:
            continue
        wanted = signature(result, params, state, *arguments)
        compiled.compile(wanted)
        made = compiled.get_compile_result(wanted)
        found[place] = made.library.get_pointer_to_function(made.fndesc.llvm_cfunc_wrapper_name)
    return found
