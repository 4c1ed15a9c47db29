"""Passing a NamedTuple of arrays to compiled code as one pointer.

By value, Numba passes every array of the tuple as seven words or more, 250 in all for a simulator:
a call costs more than what it calls, and every function compiled carries code for all of them.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import AttributeTemplate
from numba.extending import (
    NativeValue,
    infer_getattr,
    lower_getattr_generic,
    models,
    register_model,
    typeof_impl,
    unbox,
)


class Reference(types.Type):
    """The type of a pointer to a NamedTuple that nobody changes while compiled code runs."""

    def __init__(self, target: types.NamedTuple) -> None:
        self.target = target
        super().__init__(name=f"Reference({target.name})")


@register_model(Reference)
class _ReferenceModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Reference) -> None:
        super().__init__(dmm, fe_type, cgutils.voidptr_t)  # type: ignore[no-untyped-call]


@infer_getattr
class _Fields(AttributeTemplate):
    key = Reference

    def generic_resolve(  # type: ignore[override]
        self, typ: Reference, attr: str
    ) -> types.Type | None:
        names = typ.target.fields
        return typ.target.types[names.index(attr)] if attr in names else None


@lower_getattr_generic(Reference)  # type: ignore[untyped-decorator]
def load_field(context: Any, builder: Any, typ: Reference, value: Any, attr: str) -> Any:
    """Load a field of the tuple; of an array that is where it lies, and its shape."""
    i = typ.target.fields.index(attr)
    data_type = context.get_data_type(typ.target)
    pointer = builder.bitcast(value, data_type.as_pointer())
    field = cgutils.gep_inbounds(builder, pointer, 0, i)
    block = builder.block
    before = len(block.instructions)
    loaded = context.unpack_value(builder, typ.target.types[i], field)
    empty = builder.module.add_metadata([])
    for instruction in block.instructions[before:]:
        if instruction.opname == "load":
            # what a kernel writes to arrays does not change where they are
            instruction.set_metadata("invariant.load", empty)
    return loaded


@unbox(Reference)  # type: ignore[untyped-decorator]
def _unbox(typ: Reference, obj: Any, c: Any) -> NativeValue:
    """Keep the unboxed tuple on the stack of the wrapper, and pass where it is."""
    native = c.unbox(typ.target, obj)
    slot = cgutils.alloca_once(c.builder, c.context.get_data_type(typ.target))
    c.context.pack_value(c.builder, typ.target, native.value, slot)
    pointer = c.builder.bitcast(slot, cgutils.voidptr_t)
    # the optimiser must not know what it points to, or it could load fields before they are stored
    through = ir.FunctionType(cgutils.voidptr_t, [cgutils.voidptr_t])
    hidden = c.builder.asm(through, "", "=r,0,~{memory}", [pointer], side_effect=True)
    return NativeValue(hidden, is_error=native.is_error, cleanup=native.cleanup)


def pass_by_reference(kind: type[tuple[Any, ...]]) -> None:
    """Let Numba pass NamedTuples of a class by reference."""
    tuple_typeof = typeof_impl.dispatch(tuple)

    @typeof_impl.register(kind)
    def _typeof(value: Any, context: Any) -> Reference:
        return Reference(tuple_typeof(value, context))
