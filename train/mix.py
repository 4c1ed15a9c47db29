"""Scenarios that one dispatcher is trained on together, so that it serves all of them."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from servegym.documents import checked, read_mapping
from servegym.errors import ConfigError
from servegym.policy.counterfactual import Worth
from servegym.scenario import Scenario, load_scenario
from servegym.scenario.config import Config, Factor, ascending
from servegym.scenario.disturbances import DisturbanceConfig
from servegym.scenario.files import bundled_names, load
from servegym.scenario.fleet import FleetEntry
from servegym.scenario.scenario import ActionConfig
from servegym.traced_scenario import capacity_rps

_FOLDER = "mixes"
#: The key by which a file tells that it is one.
_KEY = "variants"
#: Requests of the episode by which the rate of another fleet is found.
_SAMPLE = 2000


class Prices(Config):
    """What a choice costs besides the time that it adds to who is there, as trainers' settings say.

    Those that are not given are the trainer's own.
    """

    prefix_price: float | None = Field(None, ge=0)
    prefill_price: float | None = Field(None, ge=0)
    memory_price: float | None = Field(None, ge=0)
    second_price: float | None = Field(None, ge=0)
    stretch: float | None = Field(None, gt=0)
    softness: float | None = Field(None, gt=0)

    def over(self, worth: Worth) -> Worth:
        """Put them in place of those of a trainer."""
        given = self.model_dump(exclude_none=True)
        if "second_price" in given:
            given["second"] = given.pop("second_price")
        return worth._replace(**given)


class Part(Config):
    """A scenario, the range of its loads, drawn for every episode, and its prices."""

    scenario: Scenario
    load: tuple[Factor, Factor]
    prices: Prices = Prices()

    _check_range = field_validator("load")(ascending)


class Variant(Config):
    """A scenario, as it is or with another fleet or other disturbances.

    A bundled one by name, or a file by its path from the folder of the mix. Another fleet gets as
    much more or less of the requests as it can bear by the cost model.
    """

    scenario: str
    fleet: tuple[FleetEntry, ...] | None = Field(None, min_length=1)
    disturbances: DisturbanceConfig | None = None
    load: tuple[Factor, Factor] = (0.6, 1.1)
    prices: Prices = Prices()

    def part(self, folder: Path) -> Part:
        """Make the scenario.

        Args:
            folder: Of the mix.

        Raises:
            ConfigError: If there is no such scenario, or its rate cannot follow the fleet.
        """
        is_file = self.scenario.endswith((".yaml", ".yml"))
        made = load_scenario(folder / self.scenario if is_file else self.scenario)
        update: dict[str, Any] = {}
        if self.disturbances is not None:
            update["disturbances"] = self.disturbances
        if self.fleet is not None:
            update["fleet"] = self.fleet
            workload = made.workload
            rate_rps = getattr(workload, "rate_rps", None)
            if rate_rps is None:
                raise ConfigError(
                    f"{self.scenario} has no rate that another fleet could get more or less of:"
                    " leave fleet out"
                )
            other = made.model_copy(update={"fleet": self.fleet})
            table = made.episode(0, num_requests=_SAMPLE).table
            before, after = (
                capacity_rps(x.spec, x.episode(0, num_requests=1), table) for x in (made, other)
            )
            update["workload"] = workload.model_copy(update={"rate_rps": rate_rps * after / before})
        # through the checks of a scenario again: nothing changed may be impossible
        return Part(
            scenario=Scenario.model_validate(made.model_copy(update=update).model_dump()),
            load=self.load,
            prices=self.prices,
        )


class Mix(Config):
    """Scenarios that are trained on together.

    Attributes:
        name: Of the mix.
        parts: Of one objective and with the same actions besides replicas.
    """

    name: str
    parts: tuple[Part, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_alike(self) -> Self:
        first = self.parts[0].scenario
        for part in self.parts[1:]:
            other = part.scenario
            for what in ("objective", "actions"):
                if getattr(other, what) != getattr(first, what):
                    raise ValueError(
                        f"all scenarios of a mix must have the same {what}, and those of"
                        f" {first.name} and {other.name} differ"
                    )
        return self

    @property
    def objective(self) -> Literal["latency", "tail", "goodput"]:
        """What all are judged by."""
        return self.parts[0].scenario.objective

    @property
    def actions(self) -> ActionConfig:
        """What a router may do in all besides choosing a replica."""
        return self.parts[0].scenario.actions


class _File(Config):
    """What a file says."""

    name: str
    description: str = ""
    variants: tuple[Variant, ...] = Field(min_length=1)


def mix_names() -> list[str]:
    """Names of the bundled mixes."""
    return bundled_names(_FOLDER)


def is_mix(name_or_path: str) -> bool:
    """Whether a name is that of a bundled mix, or a file holds one."""
    if not name_or_path.endswith((".yaml", ".yml")):
        return name_or_path in mix_names()
    path = Path(name_or_path)
    if not path.is_file():
        return False
    return _KEY in read_mapping(path.read_text(encoding="utf-8"), name_or_path, _KEY)


def load_mix(name_or_path: str) -> Mix:
    """Load a bundled mix by name, or one of your own by its file.

    Raises:
        ConfigError: If there is none, or a key or value in it is not allowed.
    """
    file = load(name_or_path, _FOLDER, "mix", _File)
    folder = Path(name_or_path).parent
    if name_or_path in mix_names():
        folder = Path(str(resources.files("servegym.assets").joinpath(_FOLDER)))
    parts = tuple(variant.part(folder) for variant in file.variants)
    return checked({"name": file.name, "parts": parts}, name_or_path, Mix)


def parts_of(played: Scenario | Mix, load: tuple[float, float]) -> tuple[Part, ...]:
    """Return the parts of a mix, or a scenario at loads of such a range as the only one."""
    return played.parts if isinstance(played, Mix) else (Part(scenario=played, load=load),)
