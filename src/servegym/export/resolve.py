"""From a policy's name or file to the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, overload

from servegym.baselines.migration.registry import MIGRATIONS, migration
from servegym.baselines.ordering.registry import RULES as ORDERS
from servegym.baselines.ordering.registry import ordering_policy
from servegym.baselines.parts import join_parts, split_parts
from servegym.baselines.placement import PLACEMENTS, placement
from servegym.baselines.registry import policy
from servegym.baselines.retention.registry import RETENTIONS, retention
from servegym.baselines.rules import Rules
from servegym.errors import ConfigError, unknown_name
from servegym.export.fleet import FLEET_PROBLEMS, exported_fleet
from servegym.export.llm_d_file import SUFFIXES as SCHEDULING_SUFFIXES
from servegym.export.llm_d_file import scheduling_rule
from servegym.export.manifest import Manifest, policy_name, read_manifest
from servegym.export.ordering import SUFFIXES, exported_ordering
from servegym.export.shipped import shipped_path
from servegym.export.weights import read_network
from servegym.policy.frozen import FrozenPolicy, NumpyPolicy
from servegym.policy.migrating import Migrating
from servegym.policy.numpy_network import HELD_FAMILY, NetworkShape
from servegym.policy.online import OnlinePolicy
from servegym.policy.ordering import OrderingPolicy
from servegym.policy.pair import Pair
from servegym.policy.placed import Placed
from servegym.policy.policy import Policy
from servegym.policy.retention import Kept
from servegym.workflow.online.policy import WorkflowPolicy

#: Of files of dispatchers: networks and closed-form scores.
DISPATCH_SUFFIXES = (*SUFFIXES, ".json")
#: Where the folder of a learned pair has the router's part, and that of the engines' plug-in.
DISPATCHER_FILE, ORDER_FILE = "policy/policy.onnx", "ordering.npz"


@overload
def load_policy(path: Path, problem: Literal["dispatch"]) -> Policy: ...
@overload
def load_policy(path: Path, problem: Literal["order"]) -> OrderingPolicy: ...
@overload
def load_policy(path: Path, problem: Literal["workflow"]) -> WorkflowPolicy: ...
@overload
def load_policy(path: Path, problem: str = "") -> Policy | OrderingPolicy | WorkflowPolicy: ...
def load_policy(path: Path, problem: str = "") -> Policy | OrderingPolicy | WorkflowPolicy:
    """Load an exported policy, of whatever problem.

    Args:
        path: Its file.
        problem: What it must be for; anything if it is empty.

    Raises:
        ExportError: If it is one of another problem, or no valid policy.
    """
    manifest = read_manifest(path, problem)
    if manifest.problem == "order":
        return exported_ordering(path, manifest)
    if manifest.problem in FLEET_PROBLEMS:
        return exported_fleet(path, manifest)
    if manifest.problem == "workflow":
        # compiled when it is imported: not for those who have no jobs
        from servegym.export.workflow import exported_scheduler

        return exported_scheduler(path, manifest)
    return exported_policy(path, manifest)


def resolve_policy(text: str) -> Policy:
    """Return a dispatch policy.

    Args:
        text: A rule by name (`"speed-family:eta=0.5"`), an exported policy by its file, one that
            comes with servegym by its name, or llm-d's scheduling file.

    Raises:
        ConfigError: If there is no such rule or parameter.
        ExportError: If the file is not a valid policy.
    """
    if text.endswith(DISPATCH_SUFFIXES):
        return load_policy(Path(text), "dispatch")
    shipped = shipped_path(text)
    return policy(rule_text(text)) if shipped is None else load_policy(shipped, "dispatch")


def rule_text(text: str) -> str:
    """Return a rule's text, be it that or llm-d's scheduling file, which describes one.

    Raises:
        ConfigError: If the file asks for what no rule does, or for what two do together.
    """
    if not text.endswith(SCHEDULING_SUFFIXES):
        return text
    found = scheduling_rule(Path(text))
    if len(split_parts(found)) > 1:
        raise ConfigError(
            f"{text} says who prefills and who decodes: name it alone, in a fleet whose replicas "
            "have roles"
        )
    return found


def resolve_dispatch(text: str) -> Policy | Pair:
    """Return a dispatch policy, or what it makes with the rule behind a plus.

    Args:
        text: As `resolve_policy` takes it; or `"DISPATCH+PLACEMENT"`, which makes a `Placed`;
            `"DISPATCH+MIGRATION"`, which makes a `Migrating`; `"DISPATCH+RETENTION"`, which makes a
            `Kept`; or `"DISPATCH+ORDER"`, the second part as `resolve_order` takes it, which makes
            a `Pair`; or a folder with both parts of a learned one; or llm-d's scheduling file.

    Raises:
        ConfigError: If there is no such rule, order or parameter, or there are more parts.
        ExportError: If a file is not a valid policy.
    """
    if Path(text).is_dir():
        return load_pair(Path(text))
    if text.endswith(SCHEDULING_SUFFIXES) and len(split_parts(text)) == 1:
        text = scheduling_rule(Path(text))
    dispatch, *more = dispatch_parts(text)
    if not more:
        return _fleet_or_not(dispatch)
    first = resolve_policy(dispatch)
    if isinstance(first, OnlinePolicy):
        raise ConfigError(
            f"{dispatch} learns from ended requests, of which it is told only where it decides"
            f" alone: choose another policy to go with {more[0]}"
        )
    name = more[0].partition(":")[0]
    known = [*PLACEMENTS, *MIGRATIONS, *RETENTIONS, *ORDERS.names()]
    if not more[0].endswith(SUFFIXES) and name not in known:
        raise ConfigError(unknown_name("order, placement, migration or retention", name, known))
    rules, other = second_rules(more[0]), more[0]
    if rules is PLACEMENTS:
        place = placement(other)
        return Placed(first, place, name=join_parts((first.name, place.name)))
    if rules is MIGRATIONS:
        move = migration(other)
        return Migrating(first, move, name=join_parts((first.name, move.name)))
    if rules is RETENTIONS:
        rule = retention(other)
        return Kept(first, rule, name=join_parts((first.name, rule.name)))
    order = resolve_order(other)
    return Pair(first, order, name=join_parts((first.name, order.name)))


def _fleet_or_not(text: str) -> Policy:
    """Return what `resolve_policy` does, or both decisions of a file that takes both."""
    if not text.endswith(DISPATCH_SUFFIXES):
        return resolve_policy(text)
    path = Path(text)
    manifest = read_manifest(path)
    if manifest.problem in FLEET_PROBLEMS:
        return exported_fleet(path, manifest)
    return load_policy(path, "dispatch")


def load_pair(folder: Path) -> Pair:
    """Load a dispatcher and the order beside it, as a run that trains both has written them.

    Raises:
        ExportError: If the folder does not hold both, or one is no valid policy.
    """
    first = load_policy(folder / DISPATCHER_FILE, "dispatch")
    order = load_policy(folder / ORDER_FILE, "order")
    return Pair(first, order, name=order.name)


def second_rules(part: str) -> Rules[Any]:
    """Rules that the part behind a dispatch policy is one of; a file is of an order."""
    name = part.partition(":")[0]
    others: tuple[Rules[Any], ...] = (PLACEMENTS, MIGRATIONS, RETENTIONS)
    return next((rules for rules in others if name in rules.names()), ORDERS)


def dispatch_parts(text: str) -> tuple[str, ...]:
    """Split the text of a dispatch policy: one part, or two with whatever else it decides.

    Raises:
        ConfigError: If there are more.
    """
    parts = split_parts(text)
    if len(parts) > 2:
        raise ConfigError(
            "a policy of a fleet must have one part or two, DISPATCH+ORDER, DISPATCH+PLACEMENT, "
            f"DISPATCH+MIGRATION or DISPATCH+RETENTION, got {text!r}"
        )
    return parts


def resolve_order(text: str) -> OrderingPolicy:
    """Return an order by name (`"trail:young=0.5"`), or a learned one by its file.

    Raises:
        ConfigError: If there is no such order or parameter.
        ExportError: If the file is not a valid order.
    """
    return load_policy(Path(text), "order") if text.endswith(SUFFIXES) else ordering_policy(text)


def exported_policy(path: Path, manifest: Manifest) -> Policy:
    """Return the policy of a verified manifest: a score, a network in NumPy, else a graph in ONNX.

    Raises:
        ExportError: If the files cannot be run.
    """
    if path.suffix == ".json":
        # compiled when it is imported: not for those who have no scores
        from servegym.export.score import exported_score

        return exported_score(path, manifest)
    name, network = policy_name(path), read_network(path.parent, manifest)
    if network is not None:
        return NumpyPolicy(
            network, information=manifest.information, name=name, extended=manifest.extended
        )
    return FrozenPolicy(
        path,
        num_extra=manifest.num_extra_actions,
        information=manifest.information,
        name=name,
        extended=manifest.extended,
        holds=isinstance(manifest.network, NetworkShape) and manifest.network.family == HELD_FAMILY,
    )
