"""A fleet whose requests migrate: who dispatches, and who says which requests move, as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from servegym.cluster.spec import ClusterSpec
from servegym.errors import ConfigError
from servegym.policy.contract import Group
from servegym.policy.policy import Information, Observations, Policy
from servegym.typing import FloatArray, IntArray


@dataclass(frozen=True)
class MigrationRule:
    """A rule that says at every tick which requests move; the core plays it, or asks.

    Attributes:
        name: Name in tables.
        settings: What it sets of `cluster.spec.MigrationRules`.
        reference: Where it comes from.
        information: What it may know: it looks into engines at every tick.
        weights: Of a learned one, that is asked in place of the core's rules: see
            `policy.move_scores`.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    reference: str = ""
    information: Information = "metric"
    weights: FloatArray | None = None


@dataclass(frozen=True)
class Migrating:
    """A dispatch policy, and a rule for which requests move afterwards.

    As a `Policy` it dispatches; a cluster made by `spec` goes by the rule.

    Attributes:
        dispatch: Says which replica gets a request.
        rule: Says which requests move to another one.
        name: Name in tables.
    """

    dispatch: Policy
    rule: MigrationRule
    name: str

    @property
    def information(self) -> Information:
        """What the one that knows more knows."""
        classes = get_args(Information)
        known = (self.dispatch.information, self.rule.information)
        found: Information = max(known, key=classes.index)
        return found

    @property
    def needs(self) -> Group:
        """Feature groups that the dispatcher reads."""
        return self.dispatch.needs

    def spec(self, spec: ClusterSpec) -> ClusterSpec:
        """Return a cluster whose requests move by the rule.

        Raises:
            ConfigError: If none can move there.
        """
        if not spec.migrates:
            raise ConfigError(
                f"{self.rule.name} says which requests move to another replica, but the scenario "
                "has no migration: take the dispatch policy alone"
            )
        return replace(spec, migration=replace(spec.migration, **self.rule.settings))

    def reset(self, num_envs: int, seed: int) -> None:
        """See `Policy.reset`."""
        self.dispatch.reset(num_envs, seed)

    def act(self, observations: Observations, env_ids: IntArray) -> IntArray:
        """Dispatch; see `Policy.act`."""
        return self.dispatch.act(observations, env_ids)
