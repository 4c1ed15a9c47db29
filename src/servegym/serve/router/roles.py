"""Which replicas may do which part of a request, and who cannot do with parts at all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from servegym.cluster.spec import Role
from servegym.errors import ConfigError
from servegym.serve.discovery.config import DiscoverConfig
from servegym.serve.router.replica import ReplicaConfig
from servegym.serve.transfers import Transfers
from servegym.typing import BoolArray

#: Why a picker that sees no answers does not.
PICKER_AND_ROLES = (
    "where a gateway sends no bodies of answers nobody knows when KV was fetched: take "
    "response: bodies"
)


def refuse_roles(
    replicas: Iterable[ReplicaConfig], discover: DiscoverConfig | None, reason: str
) -> None:
    """Check that no replica has a role, nor one that will be found.

    Args:
        replicas: That are known.
        discover: How others are found, if they are.
        reason: Why there may be none, and what to do.

    Raises:
        ValueError: If one has.
    """
    templates = discover.templates if discover else ()
    named: list[tuple[str, Role]] = [(replica.name, replica.role) for replica in replicas]
    named += [(f"the template for {one.names}", one.role) for one in templates]
    for name, role in named:
        if role != "mixed":
            raise ValueError(f"{name} has the role {role}, but {reason}, or the role mixed")


def refuse_role(replica: ReplicaConfig, reason: str) -> None:
    """Check that a replica that comes later has no role; see `refuse_roles`.

    Raises:
        ConfigError: If it has.
    """
    try:
        refuse_roles([replica], None, reason)
    except ValueError as error:
        raise ConfigError(str(error)) from error


class Candidates(NamedTuple):
    """Replicas that a request may be dispatched to.

    Attributes:
        slots: `bool[W]`.
        missing: What is missing where there is none, in words.
    """

    slots: BoolArray
    missing: str


def candidates(
    found: BoolArray,
    transfers: Transfers,
    *,
    divisible: bool,
    decoders_prefill: bool,
    tried: Iterable[int],
) -> Candidates:
    """Choose among replicas that are up by their roles.

    Args:
        found: Replicas that are up and have the model, `bool[W]`.
        transfers: Knows their roles.
        divisible: Whether two replicas can do the request.
        decoders_prefill: Whether those of role `decode` can do all of one.
        tried: Slots of those that have failed it.
    """
    decoding = found & transfers.decoding
    if not decoding.any():
        return Candidates(decoding, "replica that decodes")
    able = found & transfers.prefilling if divisible else decoding & transfers.prefilling
    untried = able.copy()
    untried[list(tried)] = False
    if decoders_prefill and not untried.any():
        able = able | decoding
    missing = "replica that prefills" if divisible else "replica that does all of a request"
    return Candidates(able, missing)
