"""Tables of rules: by name to a rule, with its parameters, their ranges and its oracle."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

from servegym.baselines.parameters import read_parameters
from servegym.errors import ConfigError, unknown_name
from servegym.policy.policy import Information

_ORACLE = "-oracle"


class NamedRule(Protocol):
    """A dataclass with a name and an information class, whatever it decides."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str:
        """Name in tables."""

    @property
    def information(self) -> Information:
        """What it may know."""

    @property
    def reference(self) -> str:
        """Where the rule comes from."""


R = TypeVar("R", bound=NamedRule)


class Range(NamedTuple):
    """Within which a parameter is tuned."""

    low: float
    high: float
    logarithmic: bool = False


@dataclass(frozen=True)
class Entry(Generic[R]):
    """A line of a table of rules.

    Attributes:
        factory: Makes the rule; its arguments are the parameters, its docstring the description.
        ranges: Of the parameters that tuning searches.
        bounds: `(low, high)` of the parameters that are not just any number of at least 0.
        has_oracle: Whether there is `NAME-oracle` too, which is told the truth that others predict.
    """

    factory: Callable[..., R]
    ranges: Mapping[str, Range] = field(default_factory=dict)
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    has_oracle: bool = False


class Description(NamedTuple):
    """What lists say about a rule.

    Attributes:
        parameters: With their defaults, `"eta=1, weight=0.05"`.
        text: What it does, in a sentence.
        reference: Where it comes from.
    """

    parameters: str
    text: str
    reference: str


class Rules(Generic[R]):
    """All rules of a problem by name; `"NAME:key=number,key=number"` makes one."""

    def __init__(self, kind: str, entries: Mapping[str, Entry[R]]) -> None:
        """Keep the table.

        Args:
            kind: What a rule is called in error messages, such as `"policy"`.
            entries: By name, in the order of comparisons.
        """
        self.kind = kind
        self._entries = dict(entries)

    def __iter__(self) -> Iterator[str]:
        """Names in the order of the table, without the oracles."""
        return iter(self._entries)

    def names(self) -> list[str]:
        """Names of all rules, oracles included, sorted."""
        oracles = [f"{name}{_ORACLE}" for name, rule in self._entries.items() if rule.has_oracle]
        return sorted([*self._entries, *oracles])

    def tunable(self) -> dict[str, Mapping[str, Range]]:
        """Ranges by parameter of the rules that can be tuned, by name."""
        return {name: rule.ranges for name, rule in self._entries.items() if rule.ranges}

    def make(self, text: str) -> R:
        """Make a rule from its name and parameters.

        Args:
            text: A name, optionally with parameters: `"speed-family:eta=0.5"`. `NAME-oracle` is
                shown the truth.

        Returns:
            The rule.

        Raises:
            ConfigError: If the name or a parameter is unknown, a parameter is given twice, or a
                value is not allowed.
        """
        name, _, given = text.partition(":")
        entry = self._entry(name)
        made = entry.factory(**read_parameters(name, entry.factory, given, entry.bounds))
        made = replace(made, name=text if given else name)
        return made if name in self._entries else replace(made, information="oracle")

    def describe(self, name: str) -> Description:
        """Say what lists say about a rule.

        Raises:
            ConfigError: If there is no such rule.
        """
        factory = self._entry(name).factory
        known = inspect.signature(factory).parameters.values()
        text = (inspect.getdoc(factory) or "").partition("\n")[0]
        parameters = ", ".join(f"{p.name}={p.default:g}" for p in known)
        return Description(parameters, text, self.make(name).reference)

    def _entry(self, name: str) -> Entry[R]:
        if name not in self.names():
            raise ConfigError(unknown_name(self.kind, name, self.names()))
        return self._entries.get(name) or self._entries[name.removesuffix(_ORACLE)]
