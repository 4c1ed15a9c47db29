"""Passing a NamedTuple of arrays to compiled code as one pointer.

By value, Numba passes every array of the tuple as seven words or more, 250 in all for a simulator:
a call costs more than what it calls, and every function compiled carries code for all of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.registry import cpu_target
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
        self._data_type = dmm.lookup(fe_type.target).get_data_type()

    def from_argument(self, builder: Any, value: Any) -> Any:
        """Tell the optimiser that all fields may be read at any time: it lifts them out of loops.

        Without this it leaves a load where it stands if a loop before it might never end.
        """
        if isinstance(value, ir.Argument):
            size = cpu_target.target_context.get_abi_sizeof(self._data_type)
            value.attributes.dereferenceable = size
        return value


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
    kind = typ.target.types[i]
    if isinstance(kind, types.Array):
        return _load_parts(builder, field)
    block = builder.block
    before = len(block.instructions)
    loaded = context.unpack_value(builder, kind, field)
    for instruction in block.instructions[before:]:
        if instruction.opname == "load":
            _never_changes(builder, instruction)
    return loaded


def _load_parts(builder: Any, pointer: Any) -> Any:
    """Load a structure word by word: of a load of several words LLVM forgets what is known."""
    kind = pointer.type.pointee
    if not isinstance(kind, ir.Aggregate):
        loaded = builder.load(pointer)
        _never_changes(builder, loaded)
        return loaded
    whole = ir.Constant(kind, ir.Undefined)
    for i in range(len(kind)):
        part = _load_parts(builder, cgutils.gep_inbounds(builder, pointer, 0, i))
        whole = builder.insert_value(whole, part, i)
    return whole


def _never_changes(builder: Any, load: Any) -> None:
    """Tell the optimiser that what a kernel writes to arrays does not change where they are."""
    load.set_metadata("invariant.load", builder.module.add_metadata([]))


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
    known: dict[tuple[object, ...], Reference] = {}

    @typeof_impl.register(kind)
    def _typeof(value: Any, context: Any) -> Reference:
        # to make the types of the records anew takes longer than to make the records
        key = tuple(_key(part, context) for part in value)
        if key not in known:
            known[key] = Reference(tuple_typeof(value, context))
        return known[key]


def _key(part: Any, context: Any) -> object:
    """All that the type of a field depends on."""
    if isinstance(part, np.ndarray):
        return part.dtype, part.ndim, part.flags.num
    return typeof_impl(part, context)
