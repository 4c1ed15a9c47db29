"""All families of jobs by name."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field, ValidationError

from servegym.errors import ConfigError, unknown_name
from servegym.workflow.job import Job
from servegym.workflow.workloads.coding_agent import CodingAgent
from servegym.workflow.workloads.family import Family
from servegym.workflow.workloads.map_reduce import MapReduce
from servegym.workflow.workloads.planner import PlannerExecutor
from servegym.workflow.workloads.post_training import PostTraining
from servegym.workflow.workloads.random_dag import RandomDagJob
from servegym.workflow.workloads.text_to_sql import TextToSql
from servegym.workflow.workloads.transformer_layer import TransformerLayer
from servegym.workflow.workloads.tree_search import BestOfN, TreeSearch
from servegym.workflow.workloads.wfcommons import WfCommons

WORKLOADS: dict[str, type[Family]] = {
    "text-to-sql": TextToSql,
    "map-reduce": MapReduce,
    "best-of-n": BestOfN,
    "tree-search": TreeSearch,
    "planner-executor": PlannerExecutor,
    "coding-agent": CodingAgent,
    "post-training": PostTraining,
    "transformer-layer": TransformerLayer,
    "random-dag": RandomDagJob,
    "wfcommons": WfCommons,
}

#: For configuration files: `kind` is the name.
WorkloadConfig = Annotated[
    TextToSql
    | MapReduce
    | BestOfN
    | TreeSearch
    | PlannerExecutor
    | CodingAgent
    | PostTraining
    | TransformerLayer
    | RandomDagJob
    | WfCommons,
    Field(discriminator="kind"),
]


def workload(name: str, **params: object) -> Family:
    """Return a family with the given parameters; the others are its defaults.

    Raises:
        ConfigError: If there is no such family or parameter, or a value is not allowed.
    """
    if name not in WORKLOADS:
        raise ConfigError(unknown_name("workload", name, WORKLOADS))
    family = WORKLOADS[name]
    for key in params:
        if key not in family.model_fields or key == "kind":
            known = [field for field in family.model_fields if field != "kind"]
            raise ConfigError(unknown_name(f"parameter of {name}", key, known))
    try:
        return family.model_validate(params)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([name, *map(str, first["loc"])])
        what = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: {what[0].lower()}{what[1:]}") from None


def draw(name: str, rng: np.random.Generator, num_jobs: int, **params: object) -> list[Job]:
    """Draw jobs of a family; the same state of `rng` gives the same ones.

    Args:
        name: A key of `WORKLOADS`.
        rng: Randomness.
        num_jobs: How many.
        params: Fields of the family; docs/workflow-workloads.md lists them.

    Raises:
        ConfigError: If a name or a value is not allowed.
    """
    if num_jobs < 1:
        raise ConfigError(f"num_jobs must be at least 1, got {num_jobs}")
    family = workload(name, **params)
    return [family.job(rng) for _ in range(num_jobs)]
