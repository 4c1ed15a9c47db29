"""Reading an engine's Prometheus page: vLLM's names old and new, SGLang's, or a mapping's."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from servegym.errors import ConfigError, ServeGymError, unknown_name
from servegym.serve.state import EngineMetrics


class MetricsError(ServeGymError):
    """Raised when a metrics page lacks what it should have."""


class MetricNames(BaseModel):
    """What the quantities are called; of several names the first on the page counts.

    Counts are summed over the samples of a name (engines of a data-parallel server), shares are
    averaged. Samples of tensor- or pipeline-parallel ranks other than 0 repeat rank 0's.

    Attributes:
        num_running: Requests in the running list.
        num_waiting: Requests in the waiting queue.
        kv_cache_usage: Share of KV blocks held, 0 to 1.
        generated_tokens: Output tokens of unfinished requests; few engines say.
        kv_capacity_tokens: Size of the KV cache.
        cache_config: An info metric whose labels `block_size` and `num_gpu_blocks` give that size.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_running: tuple[str, ...] = Field(min_length=1)
    num_waiting: tuple[str, ...] = Field(min_length=1)
    kv_cache_usage: tuple[str, ...] = Field(min_length=1)
    generated_tokens: tuple[str, ...] = ()
    kv_capacity_tokens: tuple[str, ...] = ()
    cache_config: tuple[str, ...] = ()


#: Checked against vLLM 0.32's page; the older name of the usage was in use up to 0.9.
VLLM = MetricNames(
    num_running=("vllm:num_requests_running",),
    num_waiting=("vllm:num_requests_waiting",),
    kv_cache_usage=("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    cache_config=("vllm:cache_config_info",),
)
#: From SGLang's documentation of its production metrics.
SGLANG = MetricNames(
    num_running=("sglang:num_running_reqs",),
    num_waiting=("sglang:num_queue_reqs",),
    kv_cache_usage=("sglang:token_usage",),
    kv_capacity_tokens=("sglang:max_total_num_tokens",),
)
KNOWN = {"vllm": VLLM, "sglang": SGLANG}


class Sample(NamedTuple):
    """One line of a metrics page."""

    name: str
    labels: dict[str, str]
    value: float
    time_s: float  # NaN if the line has no time


_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)\s*=\s*"((?:[^"\\]|\\.)*)"')
_LINE = re.compile(
    r"^[ \t]*([a-zA-Z_:][a-zA-Z0-9_:]*)[ \t]*"
    r'(\{(?:[^"}\n]|"(?:[^"\\\n]|\\.)*")*\})?[ \t]+(\S+)(?:[ \t]+(-?\d+))?[ \t]*\r?$',
    re.MULTILINE,
)


def samples(text: str, wanted: frozenset[str]) -> Iterator[Sample]:
    """Yield the samples of some names; lines that make no sense are passed over.

    Args:
        text: The page, in Prometheus' text format.
        wanted: Names.
    """
    for match in _LINE.finditer(text):
        name, labels, value, time_ms = match.groups()
        if name not in wanted:
            continue
        try:
            number = float(value)
        except ValueError:
            continue
        found = dict(_LABEL.findall(labels)) if labels else {}
        yield Sample(name, found, number, float(time_ms) / 1e3 if time_ms else math.nan)


def metric_names(text: str) -> MetricNames | None:
    """Return the names of a known engine, of a mapping file, or `None` for `"auto"`.

    Args:
        text: `auto`, `vllm`, `sglang`, or the path of a YAML file with the keys of `MetricNames`.

    Raises:
        ConfigError: If it is none of these.
    """
    if text == "auto":
        return None
    if text in KNOWN:
        return KNOWN[text]
    if not text.endswith((".yaml", ".yml")):
        message = unknown_name("metrics", text, ["auto", *KNOWN])
        raise ConfigError(f"{message}; or give the path of a .yaml file with a mapping")
    try:
        data = yaml.safe_load(Path(text).read_text(encoding="utf-8"))
        return MetricNames.model_validate(
            {key: (names,) if isinstance(names, str) else names for key, names in data.items()}
        )
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError) as error:
        raise ConfigError(f"{text} is no readable YAML mapping of metric names") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{text}, {place}: {first['msg']}") from error


def read_metrics(text: str, names: MetricNames | None, wall_s: float = math.nan) -> EngineMetrics:
    """Read a metrics page.

    Args:
        text: The page.
        names: What to look for; `None` tries the known engines.
        wall_s: Unix time, for pages whose samples carry times.

    Raises:
        MetricsError: If a quantity is not there; a missing one must not pass for 0.
    """
    choices = [names] if names else list(KNOWN.values())
    missing = ""
    for choice in choices:
        found = _read(text, choice, wall_s)
        if isinstance(found, EngineMetrics):
            return found
        missing = missing or found
    if names is None:
        raise MetricsError(
            f"the metrics page has no {missing}, nor what {' or '.join(list(KNOWN)[1:])} has: "
            "name the engine or give a mapping file"
        )
    raise MetricsError(f"the metrics page has no {missing}: give a mapping file")


def _read(text: str, names: MetricNames, wall_s: float) -> EngineMetrics | str:
    """Return the metrics, or the first name that is missing."""
    wanted = frozenset(name for group in names.model_dump().values() for name in group)
    found: dict[str, list[Sample]] = {}
    oldest_s = math.inf
    for sample in samples(text, wanted):
        rank = sample.labels.get("tp_rank", "0"), sample.labels.get("pp_rank", "0")
        if rank == ("0", "0") and math.isfinite(sample.value):
            found.setdefault(sample.name, []).append(sample)
            if sample.time_s < oldest_s:
                oldest_s = sample.time_s

    def values(choice: tuple[str, ...]) -> list[float] | None:
        name = next((name for name in choice if name in found), None)
        return [sample.value for sample in found[name]] if name else None

    running, waiting = values(names.num_running), values(names.num_waiting)
    usage = values(names.kv_cache_usage)
    if running is None or waiting is None or usage is None:
        for choice in (names.num_running, names.num_waiting, names.kv_cache_usage):
            if values(choice) is None:
                return " or ".join(choice)
    assert running is not None
    assert waiting is not None
    assert usage is not None
    generated = values(names.generated_tokens)
    age_s = wall_s - oldest_s if math.isfinite(oldest_s) and not math.isnan(wall_s) else 0.0
    return EngineMetrics(
        num_running=max(0.0, sum(running)),
        num_waiting=max(0.0, sum(waiting)),
        kv_cache_usage=min(1.0, max(0.0, sum(usage) / len(usage))),
        generated_tokens=max(0.0, sum(generated)) if generated else None,
        kv_capacity_tokens=_capacity(names, found),
        age_s=max(0.0, age_s),
    )


def _capacity(names: MetricNames, found: dict[str, list[Sample]]) -> float | None:
    for name in names.kv_capacity_tokens:
        if name in found:
            return sum(sample.value for sample in found[name])
    for name in names.cache_config:
        total = 0.0
        for sample in found.get(name, []):
            try:
                total += int(sample.labels["block_size"]) * int(sample.labels["num_gpu_blocks"])
            except (KeyError, ValueError):
                return None  # "None" until the engine has measured its memory
        if total > 0:
            return total
    return None
