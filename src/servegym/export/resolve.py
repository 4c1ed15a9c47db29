"""From a policy's name or file to the policy."""

from __future__ import annotations

from pathlib import Path

from servegym.baselines.ordering.registry import ordering_policy
from servegym.baselines.registry import policy
from servegym.export.manifest import Manifest, policy_name, read_manifest
from servegym.export.ordering import SUFFIXES, load_ordering
from servegym.export.weights import read_network
from servegym.policy.frozen import FrozenPolicy, NumpyPolicy
from servegym.policy.ordering import OrderingPolicy
from servegym.policy.policy import Policy
from servegym.workflow.online.policy import WorkflowPolicy


def load_policy(
    path: Path, problem: str, scenario: str = ""
) -> Policy | OrderingPolicy | WorkflowPolicy:
    """Load an exported policy, of whatever problem.

    Args:
        path: Its file.
        problem: What it must be for.
        scenario: Of that problem, for the sentence that says so.

    Raises:
        ExportError: If it is one of another problem, or no valid policy.
    """
    if problem == "order":
        return load_ordering(path, scenario)
    if problem == "workflow":
        # compiled when it is imported: not for those who have no jobs
        from servegym.export.workflow import read_scheduler

        return read_scheduler(path, scenario)
    return exported_policy(path, read_manifest(path, problem, scenario))


def resolve_policy(text: str) -> Policy:
    """Return a rule by name (`"speed-family:eta=0.5"`) or an exported policy by its `.onnx` path.

    Raises:
        ConfigError: If there is no such rule or parameter.
        ExportError: If the file is not a valid policy.
    """
    if not text.endswith(SUFFIXES):
        return policy(text)
    path = Path(text)
    return exported_policy(path, read_manifest(path))


def resolve_order(text: str) -> OrderingPolicy:
    """Return an order by name (`"trail:young=0.5"`), or a learned one by the path of its file.

    Raises:
        ConfigError: If there is no such order or parameter.
        ExportError: If the file is not a valid order.
    """
    if text.endswith(SUFFIXES):
        return load_ordering(Path(text))
    return ordering_policy(text)


def exported_policy(path: Path, manifest: Manifest) -> Policy:
    """Return the policy of a verified manifest: in NumPy where its weights are there, else ONNX.

    Raises:
        ExportError: If the files cannot be run.
    """
    name, network = policy_name(path), read_network(path.parent, manifest)
    if network is not None:
        return NumpyPolicy(network, information=manifest.information, name=name)
    return FrozenPolicy(
        path, num_extra=manifest.num_extra_actions, information=manifest.information, name=name
    )
