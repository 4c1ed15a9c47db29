"""A policy for live use: loaded, checked and tried before it may decide."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from servegym.baselines.parts import join_parts
from servegym.baselines.placement import placement
from servegym.baselines.registry import policy as rule
from servegym.errors import ConfigError, ExportError
from servegym.export.fleet import exported_fleet
from servegym.export.llm_d_file import SUFFIXES as SCHEDULING_SUFFIXES
from servegym.export.llm_d_file import scheduling_rule
from servegym.export.manifest import Manifest, read_manifest
from servegym.export.resolve import DISPATCH_SUFFIXES, dispatch_parts, exported_policy
from servegym.export.shipped import shipped_path
from servegym.policy.contract import (
    DECODES,
    FIRST_NOMINAL,
    HAS_PREFILL,
    NUM_NOMINAL,
    NUM_REPLICA_FEATURES,
    NUM_REQUEST_FEATURES,
    NUM_UP,
    PREFILLS,
    UP,
    Group,
)
from servegym.policy.placed import Placed
from servegym.policy.policy import Observations, Policy
from servegym.serve.ranges import Ranges
from servegym.serve.state import rehearse_inference
from servegym.typing import BoolArray

if TYPE_CHECKING:
    from servegym.serve.runtime import RuntimeConfig

_ENV = np.zeros(1, np.int64)
#: Fleet sizes that a policy is tried on before it is put in place.
_TRIAL_SIZES = (1, 2, 16)
#: Says where requests decode if a policy does not.
DEFAULT_PLACEMENT = "least-outstanding"


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy that has passed its checks.

    Attributes:
        text: What it was loaded from.
        policy: What decides where requests go.
        manifest: Of an exported policy.
        ranges: What is not far from its training; `None` for rules.
        place: What decides where they decode that are prefilled on their own.
        places: Whether the text says so; else it is `DEFAULT_PLACEMENT`.
    """

    text: str
    policy: Policy
    manifest: Manifest | None = None
    ranges: Ranges | None = None
    place: Policy = field(default_factory=lambda: _placement(DEFAULT_PLACEMENT))
    places: bool = False

    @cached_property
    def reads_metrics(self) -> bool:
        """Whether it depends on what engines report; see `reads_metrics`."""
        return reads_metrics(self.policy)

    @cached_property
    def placing_reads_metrics(self) -> bool:
        """The same of what decides where requests decode."""
        return reads_metrics(self.place)

    @property
    def version(self) -> str:
        """First digits of the file's checksum; a rule's own text, whatever file it is from."""
        if self.manifest:
            return self.manifest.sha256[:12]
        rules = (self.policy, self.place) if self.places else (self.policy,)
        return join_parts(rule.name for rule in rules)


def reads_metrics(policy: Policy) -> bool:
    """Whether a policy depends on what engines report; a blind one only on the router's books."""
    return bool(policy.needs & Group.METRICS) and policy.information != "blind"


def load_policy(text: str, config: RuntimeConfig) -> LoadedPolicy:
    """Load a policy and try it; nothing that fails here ever decides.

    Args:
        text: A rule's name with parameters, the path of a `policy.onnx` or `score.json`, the name
            of a policy that comes with servegym, or llm-d's scheduling file; with a plus behind it
            the rule that says where requests decode; or the path of a `placed.npz`, which is both.
        config: For the ranges and the seed.

    Raises:
        ConfigError: If there is no such rule, or it cannot be live.
        ExportError: If the file is not a valid policy, or decides what it may not.
    """
    whole = scheduling_rule(Path(text)) if text.endswith(SCHEDULING_SUFFIXES) else text
    first, *more = dispatch_parts(whole)
    place = _placement(more[0] if more else DEFAULT_PLACEMENT)
    found, manifest = _dispatcher(first)
    both: tuple[Policy, ...] = (found, place)
    if isinstance(found, Placed):
        if more:
            raise ConfigError(f"{first} says itself where requests decode: leave out +{more[0]}")
        both = (found.dispatch, found.place)
    for one in both:
        if one.information == "oracle" or one.needs & Group.WHAT_IF:
            raise ConfigError(
                f"{text} cannot be live: it needs what only a simulator knows; "
                "choose another rule or an exported policy"
            )
        if one.needs & Group.LIMITS:
            rehearse_inference()
        one.reset(1, config.seed)
    ranges = Ranges.of(manifest, config.range_margin) if manifest else None
    places = bool(more) or isinstance(found, Placed)
    loaded = LoadedPolicy(text, both[0], manifest, ranges, both[1], places)
    _try_out(loaded, loaded.policy, placing=False)
    _try_out(loaded, loaded.place, placing=True)
    for one in both:
        one.reset(1, config.seed)
    return loaded


def _placement(text: str) -> Policy:
    found = placement(text)
    found.reset(1, 0)
    return found


def _dispatcher(text: str) -> tuple[Policy, Manifest | None]:
    """Return what dispatches, or takes both decisions, and its manifest if it has one."""
    path = Path(text) if text.endswith(DISPATCH_SUFFIXES) else shipped_path(text)
    if path is None:
        return rule(text), None
    manifest = read_manifest(path)
    if manifest.problem == "placed":
        found = exported_fleet(path, manifest)
        assert isinstance(found, Placed)
        return found, manifest
    manifest = read_manifest(path, "dispatch")
    return exported_policy(path, manifest), manifest


def _try_out(loaded: LoadedPolicy, policy: Policy, *, placing: bool) -> None:
    for width in _TRIAL_SIZES:
        replicas = np.zeros((NUM_REPLICA_FEATURES, width))
        request = np.ones(NUM_REQUEST_FEATURES)
        if loaded.manifest and loaded.manifest.ranges:
            middle = np.mean(loaded.manifest.ranges["replicas"], axis=1)
            replicas[: len(middle)] = middle[:, None]
            middle = np.mean(loaded.manifest.ranges["request"], axis=1)
            request[: len(middle)] = middle
        replicas[[UP, PREFILLS, DECODES]] = 1.0
        replicas[HAS_PREFILL, 0] = float(placing)
        static = replicas[FIRST_NOMINAL : FIRST_NOMINAL + NUM_NOMINAL]
        static[static == 0.0] = 1.0  # rules divide by them
        request[NUM_UP] = width
        mask = np.ones(width + 2, np.bool_)
        mask[width:] = False
        seen = Observations(replicas[None], request[None], mask[None])
        try:
            action = int(policy.act(seen, _ENV)[0])
        except Exception as error:
            raise ExportError(f"{loaded.text} fails on a fleet of {width}: {error}") from error
        if not is_allowed(action, mask):
            raise ExportError(
                f"{loaded.text} chooses {action} of {width} replicas: export the policy again"
            )


def is_allowed(action: int, mask: BoolArray) -> bool:
    """Whether an action is one of those that a mask, `bool[R + 2]`, leaves open."""
    return 0 <= action < len(mask) and bool(mask[action])
