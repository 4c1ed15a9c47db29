"""What a choice costs: formulas that rules, environments and networks share.

Plain arithmetic, so that one text serves compiled rules (number by number), NumPy arrays
(`envs.costs`) and PyTorch tensors (`agents.features`, and with it the exported graph). Where a
quantity must not be negative or zero, the caller sees to it. `policy.numpy_network` works in place
and `agents.features` sums `added-delay` in another order; tests hold both equal to these.
"""

from __future__ import annotations

from typing import Any

from servegym.cluster.jit import inlined

#: Rules whose costs a network can start from.
BASES = (
    "added-delay",
    "prefix-load",
    "speed-family",
    "least-outstanding",
    "added-delay-inferred",
    "added-delay-held",
)
#: Those that go by what a router infers.
INFERRED_BASES = ("added-delay-inferred", "added-delay-held")
#: Those that hold requests: a network that starts from one decides about that, too.
HELD_BASES = ("added-delay-held",)

#: A number, an array or a tensor.
Quantity = Any


@inlined
def step_s(alone_s: Quantity, seq_s: Quantity, others: Quantity) -> Quantity:
    """Seconds of a step that decodes one sequence beside `others`."""
    return alone_s + seq_s * others


@inlined
def delay_s(
    others: Quantity,
    prefill_s: Quantity,
    seq_s: Quantity,
    predicted_tokens: Quantity,
    prefill: float = 1.0,
    decode: float = 1.0,
) -> Quantity:
    """Seconds by which a request delays `others`, all together: its prefill and its tokens do."""
    return others * (prefill * prefill_s + decode * seq_s * predicted_tokens)


@inlined
def added_delay_s(
    queue_s: Quantity, prefill_s: Quantity, decode_s: Quantity, delay_s: Quantity
) -> Quantity:
    """Seconds that a choice costs the request itself and the others: rule `added-delay`."""
    return queue_s + prefill_s + decode_s + delay_s


@inlined
def displaced_s(new_tokens: Quantity, kv_tokens: Quantity, price_s: float) -> Quantity:
    """Seconds charged for prefixes whose room in the cache a prompt takes, by its share of it."""
    return price_s * new_tokens / kv_tokens


@inlined
def load_by_speed(outstanding: Quantity, speed: Quantity, eta: float) -> Quantity:
    """Requests there, this one included, over speed^eta: rule `speed-family`."""
    return (outstanding + 1.0) / speed**eta


@inlined
def prefix_load_s(
    prefill_s: Quantity, outstanding: Quantity, speed: Quantity, weight: float, eta: float
) -> Quantity:
    """Seconds of prefill to come plus those of the decode load: rule `prefix-load`."""
    return prefill_s + weight * (outstanding + 1.0) / speed**eta
