"""The calibration file: what was measured, where, and the costs that follow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from servegym.assets.specs import GpuSpec, gpu
from servegym.assets.specs import model as model_of
from servegym.calibrate.adaptation import Adaptation
from servegym.calibrate.correction import Correction
from servegym.calibrate.datasheet import DataSheet, prior_spec
from servegym.calibrate.engine import EngineFit
from servegym.calibrate.kernels import KernelTimes
from servegym.calibrate.machine import Machine
from servegym.costs.source import CostSource
from servegym.costs.step import StepCost
from servegym.documents import checked
from servegym.errors import ConfigError
from servegym.whole_files import write_whole

FORMAT: Literal["servegym-calibration"] = "servegym-calibration"
VERSION: Literal[1] = 1


class Calibration(BaseModel):
    """Costs of one model on one kind of replica.

    Attributes:
        format: Tells the file from others.
        version: Of the format.
        gpu: Name in `gpus.yaml`, or of the data sheet.
        datasheet: Of a device that `gpus.yaml` does not have.
        model: Name in `models.yaml`.
        tp: Tensor-parallel degree.
        machine: What was measured, if it was this machine.
        content: Kernels, an engine's fit, an adaptation, or a correction of other costs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["servegym-calibration"] = FORMAT
    version: Literal[1] = VERSION
    gpu: str
    datasheet: DataSheet | None = None
    model: str
    tp: int = Field(1, ge=1)
    machine: Machine | None = None
    content: Annotated[
        KernelTimes | EngineFit | Adaptation | Correction, Field(discriminator="kind")
    ]

    @property
    def precision(self) -> Literal["bf16", "fp8"]:
        """Of the weights that the costs are for; what is measured here is bf16."""
        fp8 = isinstance(self.content, Correction) and self.content.fp8
        return "fp8" if fp8 else "bf16"

    @property
    def spec(self) -> GpuSpec:
        """The device; priors stand in for kernels of one that only a data sheet is known of.

        Raises:
            ConfigError: If it is unknown.
        """
        if self.datasheet is None:
            return gpu(self.gpu)
        if self.datasheet.name != self.gpu:
            raise ConfigError(f"the data sheet is of {self.datasheet.name}, not of {self.gpu}")
        return prior_spec(self.datasheet)

    def source(self) -> CostSource:
        """Make it a source of costs.

        Raises:
            ConfigError: If a name is unknown, or the times are unfinished or impossible.
        """
        return self.content.source(self.spec, model_of(self.model), self.tp)

    def cost(self) -> StepCost:
        """Step cost of a replica.

        Raises:
            ConfigError: As `source`.
        """
        fp8 = self.precision == "fp8"
        return StepCost(self.spec, model_of(self.model), self.tp, fp8, source=self.source())

    def write(self, path: Path) -> None:
        """Write the file, all or nothing."""
        data = self.model_dump(mode="json", exclude_none=True)
        write_whole({path: (json.dumps(data, indent=1) + "\n").encode()})


def read_calibration(path: Path) -> Calibration:
    """Read a calibration file, and check its form.

    Raises:
        ConfigError: If it is none, or of another version.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no calibration file at {path}") from None
    except (OSError, ValueError):
        raise ConfigError(f"{path} is not a readable calibration file") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ConfigError(f"{path} is no calibration file: servegym calibrate makes them")
    if data.get("version") != VERSION:
        raise ConfigError(
            f"{path} has format version {data.get('version')}, this servegym reads {VERSION}: "
            "calibrate again"
        )
    return checked(data, str(path), Calibration)


def cost_from(path: Path) -> StepCost:
    """Step cost of the replica that a calibration file was made for.

    Raises:
        ConfigError: If the file is wrong, or its times are unfinished or impossible.
    """
    found = read_calibration(path)
    try:
        return found.cost()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def calibrated_cost(
    path: Path, gpu_name: str, model_name: str, tp: int, precision: str = "bf16"
) -> StepCost:
    """Step cost of a replica from a calibration file made for it.

    Raises:
        ConfigError: If the file was made for another, or its times are impossible.
    """
    found = read_calibration(path)
    for what, got, wanted in (
        ("gpu", found.gpu, gpu_name),
        ("model", found.model, model_name),
        ("tp", found.tp, tp),
        ("precision", found.precision, precision),
    ):
        if got != wanted:
            raise ConfigError(f"{path} was made for {what} {got}, not for {wanted}")
    return cost_from(path)
