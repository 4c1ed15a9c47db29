"""A policy for live use: loaded, checked and tried before it may decide."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from servegym.baselines.registry import policy as rule
from servegym.errors import ConfigError, ExportError
from servegym.export.manifest import Manifest, read_manifest
from servegym.export.resolve import DISPATCH_SUFFIXES, exported_policy, rule_text
from servegym.export.shipped import shipped_path
from servegym.policy.contract import (
    DECODES,
    FIRST_NOMINAL,
    NUM_NOMINAL,
    NUM_REPLICA_FEATURES,
    NUM_REQUEST_FEATURES,
    NUM_UP,
    PREFILLS,
    UP,
    Group,
)
from servegym.policy.policy import Observations, Policy
from servegym.serve.ranges import Ranges
from servegym.serve.state import rehearse_inference
from servegym.typing import BoolArray

if TYPE_CHECKING:
    from servegym.serve.runtime import RuntimeConfig

_ENV = np.zeros(1, np.int64)
#: Fleet sizes that a policy is tried on before it is put in place.
_TRIAL_SIZES = (1, 2, 16)


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy that has passed its checks.

    Attributes:
        text: What it was loaded from.
        policy: What decides.
        manifest: Of an exported policy.
        ranges: What is not far from its training; `None` for rules.
    """

    text: str
    policy: Policy
    manifest: Manifest | None = None
    ranges: Ranges | None = None

    @cached_property
    def reads_metrics(self) -> bool:
        """Whether it depends on what engines report; see `reads_metrics`."""
        return reads_metrics(self.policy)

    @property
    def version(self) -> str:
        """First digits of the file's checksum; a rule's own text, whatever file it is from."""
        return self.manifest.sha256[:12] if self.manifest else self.policy.name


def reads_metrics(policy: Policy) -> bool:
    """Whether a policy depends on what engines report; a blind one only on the router's books."""
    return bool(policy.needs & Group.METRICS) and policy.information != "blind"


def load_policy(text: str, config: RuntimeConfig) -> LoadedPolicy:
    """Load a policy and try it; nothing that fails here ever decides.

    Args:
        text: A rule's name with parameters, the path of a `policy.onnx` or `score.json`, the name
            of a policy that comes with servegym, or llm-d's scheduling file.
        config: For the ranges and the seed.

    Raises:
        ConfigError: If there is no such rule, or it cannot be live.
        ExportError: If the file is not a valid policy, or decides what it may not.
    """
    manifest = None
    path = Path(text) if text.endswith(DISPATCH_SUFFIXES) else shipped_path(text)
    if path is not None:
        manifest = read_manifest(path, "dispatch")
        found: Policy = exported_policy(path, manifest)
    else:
        found = rule(rule_text(text))
    if found.information == "oracle" or found.needs & Group.WHAT_IF:
        raise ConfigError(
            f"{text} cannot be live: it needs what only a simulator knows; "
            "choose another rule or an exported policy"
        )
    if found.needs & Group.LIMITS:
        rehearse_inference()
    found.reset(1, config.seed)
    ranges = Ranges.of(manifest, config.range_margin) if manifest else None
    loaded = LoadedPolicy(text, found, manifest, ranges)
    _try_out(loaded)
    found.reset(1, config.seed)
    return loaded


def _try_out(loaded: LoadedPolicy) -> None:
    for width in _TRIAL_SIZES:
        replicas = np.zeros((NUM_REPLICA_FEATURES, width))
        request = np.ones(NUM_REQUEST_FEATURES)
        if loaded.manifest and loaded.manifest.ranges:
            middle = np.mean(loaded.manifest.ranges["replicas"], axis=1)
            replicas[: len(middle)] = middle[:, None]
            middle = np.mean(loaded.manifest.ranges["request"], axis=1)
            request[: len(middle)] = middle
        replicas[[UP, PREFILLS, DECODES]] = 1.0
        static = replicas[FIRST_NOMINAL : FIRST_NOMINAL + NUM_NOMINAL]
        static[static == 0.0] = 1.0  # rules divide by them
        request[NUM_UP] = width
        mask = np.ones(width + 2, np.bool_)
        mask[width:] = False
        seen = Observations(replicas[None], request[None], mask[None])
        try:
            action = int(loaded.policy.act(seen, _ENV)[0])
        except Exception as error:
            raise ExportError(f"{loaded.text} fails on a fleet of {width}: {error}") from error
        if not is_allowed(action, mask):
            raise ExportError(
                f"{loaded.text} chooses {action} of {width} replicas: export the policy again"
            )


def is_allowed(action: int, mask: BoolArray) -> bool:
    """Whether an action is one of those that a mask, `bool[R + 2]`, leaves open."""
    return 0 <= action < len(mask) and bool(mask[action])
