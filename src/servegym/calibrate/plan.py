"""Which shapes of a model's operators are measured."""

from __future__ import annotations

from itertools import product
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from servegym.assets.specs import ModelSpec
from servegym.errors import ConfigError

KernelName = Literal["gemm", "prefill", "decode", "all_reduce"]
#: Rows of the output head beyond this number are never computed in a step.
HEAD_ROWS = 256


class Kernel(NamedTuple):
    """An operator at a shape.

    Attributes:
        operator: Which.
        shape: `(m, n, k)` of a GEMM; `(chunk, context)` of prefill attention; `(batch, kv_tokens)`
            of decode attention; `(bytes,)` of an all-reduce.
    """

    operator: KernelName
    shape: tuple[int, ...]


class GridSize(BaseModel):
    """Ends of the grids that are measured; powers of two lie between.

    Attributes:
        max_tokens: Of a step.
        max_context: Cached tokens of a request when it prefills.
        max_batch: Decoding sequences.
        max_kv_tokens: They attend to in all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: int = Field(8192, ge=32)
    max_context: int = Field(32768, ge=1024)
    max_batch: int = Field(256, ge=4)
    max_kv_tokens: int = Field(4194304, ge=512)


class Shapes(NamedTuple):
    """Shapes of a model's operators on one of `tp` devices.

    Attributes:
        gemms: `(n, k)`, the output head last.
        heads: Of queries.
        kv_heads: Of keys.
        head_dim: Elements of a head.
        hidden: Elements of a token between layers.
    """

    gemms: tuple[tuple[int, int], ...]
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int


def shapes_of(model: ModelSpec, tp: int) -> Shapes:
    """Shapes as `StepCost` asks for them.

    Raises:
        ConfigError: If the model cannot be split so, or has latent attention.
    """
    if tp < 1 or model.heads % tp:
        raise ConfigError(f"tp must divide the {model.heads} heads, got {tp}")
    if model.latent_dim:
        raise ConfigError("latent attention (MLA) cannot be measured yet: choose another model")
    heads, kv_heads = model.heads // tp, max(1, model.kv_heads // tp)
    gemms = [
        ((heads + 2 * kv_heads) * model.head_dim, model.hidden),
        (model.hidden, heads * model.head_dim),
    ]
    if model.num_experts:
        gemms.append((model.num_experts, model.hidden))
    else:
        width = model.ffn_dim // tp
        gemms += [((model.ffn_matrices - 1) * width, model.hidden), (model.hidden, width)]
    gemms.append((model.vocab // tp, model.hidden))
    return Shapes(tuple(dict.fromkeys(gemms)), heads, kv_heads, model.head_dim, model.hidden)


def plan(model: ModelSpec, tp: int, size: GridSize) -> list[Kernel]:
    """Every kernel to measure, in order; each operator's shapes are a full grid."""
    shapes = shapes_of(model, tp)
    found: list[Kernel] = []
    for n, k in shapes.gemms:
        last = min(HEAD_ROWS, size.max_tokens) if (n, k) == shapes.gemms[-1] else size.max_tokens
        found += [Kernel("gemm", (m, n, k)) for m in token_counts(last)]
    contexts = [0, *_powers(1024, size.max_context)]
    found += [Kernel("prefill", at) for at in product(_powers(16, size.max_tokens), contexts)]
    batches = _powers(1, size.max_batch)[::2]
    kv_tokens = _powers(batches[-1], size.max_kv_tokens)
    found += [Kernel("decode", at) for at in product(batches, kv_tokens)]
    if tp > 1:
        sizes = (2 * m * shapes.hidden for m in _powers(1, size.max_tokens))
        found += [Kernel("all_reduce", (num_bytes,)) for num_bytes in sizes]
    return found


def token_counts(last: int) -> list[int]:
    """Powers of two up to `last`, and halfway between them: where tiles of GEMMs begin."""
    powers = _powers(1, last)
    return sorted({*powers, *(3 * m // 2 for m in powers if m > 1 and 3 * m // 2 <= last)})


def _powers(first: int, last: int) -> list[int]:
    found = [first]
    while 2 * found[-1] <= last:
        found.append(2 * found[-1])
    return found
