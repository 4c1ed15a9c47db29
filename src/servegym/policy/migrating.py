"""A fleet whose requests migrate: who dispatches, and who says which requests move, as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from servegym.cluster.spec import ClusterSpec
from servegym.errors import ConfigError
from servegym.policy.contract import Group
from servegym.policy.policy import Information, Observations, Policy
from servegym.typing import IntArray


@dataclass(frozen=True)
class MigrationRule:
    """A rule that says at every tick which requests move; the core plays it.

    Attributes:
        name: Name in tables.
        settings: What it sets of `cluster.spec.MigrationRules`.
        reference: Where it comes from.
        information: What it may know: it looks into engines at every tick.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    reference: str = ""
    information: Information = "metric"


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
        """What the dispatcher knows, engine metrics at least."""
        known = self.dispatch.information
        return self.rule.information if known == "blind" else known

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
