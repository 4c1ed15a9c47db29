"""Reading an engine's Prometheus page: vLLM's, SGLang's or TensorRT-LLM's names, or a mapping's."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field

from servegym.documents import checked, load_yaml
from servegym.errors import ConfigError, ServeGymError, unknown_name
from servegym.serve.state import EngineMetrics


class MetricsError(ServeGymError):
    """Raised when a metrics page lacks what it should have."""


class MetricNames(BaseModel):
    """What the quantities are called; of several names the first on the page counts.

    A server may report several parts that hold requests of their own: vLLM's data-parallel
    engines (label `engine`), SGLang's data-parallel ranks (`dp_rank`). Counts and sizes are added
    up over them, shares are averaged. What `parts` takes for repeated counts once.

    Attributes:
        num_running: Requests in the running list.
        num_waiting: Requests in the waiting queue.
        kv_cache_usage: Share of KV blocks held, 0 to 1.
        generated_tokens: Output tokens of unfinished requests; few engines say.
        kv_capacity_tokens: Size of the KV cache.
        cache_config: An info metric whose labels `block_size` and `num_gpu_blocks` give that size.
        num_blocks: KV blocks, where `block_tokens` says how large one is.
        block_tokens: Tokens in a KV block.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_running: tuple[str, ...] = Field(min_length=1)
    num_waiting: tuple[str, ...] = Field(min_length=1)
    kv_cache_usage: tuple[str, ...] = Field(min_length=1)
    generated_tokens: tuple[str, ...] = ()
    kv_capacity_tokens: tuple[str, ...] = ()
    cache_config: tuple[str, ...] = ()
    num_blocks: tuple[str, ...] = ()
    block_tokens: tuple[str, ...] = ()

    @property
    def all(self) -> frozenset[str]:
        """Every name that is looked for."""
        return frozenset(name for group in self.model_dump().values() for name in group)


#: Checked against vLLM 0.32's page; the older name of the usage was in use up to 0.9.
VLLM = MetricNames(
    num_running=("vllm:num_requests_running",),
    num_waiting=("vllm:num_requests_waiting",),
    kv_cache_usage=("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    cache_config=("vllm:cache_config_info",),
)
#: From SGLang's sources.
SGLANG = MetricNames(
    num_running=("sglang:num_running_reqs",),
    num_waiting=("sglang:num_queue_reqs",),
    kv_cache_usage=("sglang:token_usage",),
    kv_capacity_tokens=("sglang:max_total_num_tokens",),
)
#: From TensorRT-LLM's sources; its server has them at `/prometheus/metrics`.
TENSORRT_LLM = MetricNames(
    num_running=("trtllm_num_requests_running",),
    num_waiting=("trtllm_num_requests_waiting",),
    kv_cache_usage=("trtllm_kv_cache_utilization",),
    num_blocks=("trtllm_kv_cache_max_blocks",),
    block_tokens=("trtllm_kv_cache_tokens_per_block",),
)
KNOWN = {"vllm": VLLM, "sglang": SGLANG, "tensorrt-llm": TENSORRT_LLM}

#: Ranks that hold a share of one model and all report the same requests. The rank that speaks for
#: them need not be 0: SGLang counts `tp_rank` through all data-parallel ranks.
_SAME_ON_RANKS = ("pp_rank", "tp_rank", "moe_ep_rank")
#: More samples of what is looked for are no engine's: each costs the router time at every poll.
_MAX_SAMPLES = 10_000
#: SGLang breaks a count down by this label, beside the total, whose label is empty.
_BREAKDOWN = "priority"


class Sample(NamedTuple):
    """One line of a metrics page."""

    name: str
    labels: dict[str, str]
    value: float
    time_s: float  # NaN if the line has no time


# No expression can try a character twice: what a replica sends must not cost more than its length.
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*+")
_LABEL = re.compile(
    r'[ \t]*+([a-zA-Z_][a-zA-Z0-9_]*+)[ \t]*+=[ \t]*+"([^"\\]*+(?:\\.[^"\\]*+)*+)"[ \t]*+(,|(?=\}))'
)
_BLANKS = re.compile(r"[ \t]*+")
_CLOSE = re.compile(r"[ \t]*+\}")
_TIME = re.compile(r"-?[0-9]{1,18}")


def samples(text: str, wanted: frozenset[str]) -> Iterator[Sample]:
    """Yield the samples of some names; lines that make no sense are passed over.

    Args:
        text: The page, in Prometheus' text format.
        wanted: Names.
    """
    heads = tuple(wanted)
    for line in text.split("\n"):
        line = line.strip(" \t\r")
        if not line.startswith(heads):
            continue
        name = _NAME.match(line)
        if name is None or name.group() not in wanted:
            continue
        labels: dict[str, str] = {}
        end = _labels(line, name.end(), labels)
        fields = line[end:].split(None, 2) if end >= 0 else []
        if not fields:
            continue
        time_s = math.nan
        if len(fields) > 1 and fields[1] != "#":  # after it comes an exemplar
            if not _TIME.fullmatch(fields[1]):
                continue
            time_s = float(fields[1]) / 1e3
        try:
            yield Sample(name.group(), labels, float(fields[0]), time_s)
        except ValueError:
            continue


def _labels(line: str, begin: int, labels: dict[str, str]) -> int:
    """Read a sample's labels into a dictionary; return where its value begins, -1: nowhere."""
    blanks = _BLANKS.match(line, begin)
    assert blanks is not None
    end = blanks.end()
    if not line.startswith("{", end):
        return end if end > begin else -1
    end += 1
    while (label := _LABEL.match(line, end)) is not None:
        labels[label.group(1)] = label.group(2)
        end = label.end()
        if not label.group(3):
            break
    close = _CLOSE.match(line, end)
    return close.end() if close is not None else -1


def parts(found: Iterable[Sample]) -> list[Sample]:
    """Take of one metric's samples one for each part that holds requests of its own.

    Of the ranks that share a model the lowest speaks; a breakdown is left out beside its total.

    Args:
        found: Samples of one name.
    """
    found = list(found)
    has_total = any(sample.labels.get(_BREAKDOWN) == "" for sample in found)
    speakers: dict[frozenset[tuple[str, str]], tuple[tuple[float, ...], Sample]] = {}
    for sample in found:
        labels = dict(sample.labels)
        if has_total and labels.get(_BREAKDOWN):
            continue
        rank = tuple(_rank(labels.pop(name, "")) for name in _SAME_ON_RANKS)
        part = frozenset(labels.items())
        if part not in speakers or rank < speakers[part][0]:
            speakers[part] = rank, sample
    return [sample for _, sample in speakers.values()]


def _rank(text: str) -> float:
    return float(text) if text.isascii() and text.isdecimal() else math.inf


def metric_names(text: str) -> MetricNames | None:
    """Return the names of a known engine, of a mapping file, or `None` for `"auto"`.

    Args:
        text: `auto`, `vllm`, `sglang`, `tensorrt-llm`, or the path of a YAML file with the keys
            of `MetricNames`.

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
        data = load_yaml(Path(text).read_text(encoding="utf-8"))
        listed = {k: (names,) if isinstance(names, str) else names for k, names in data.items()}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError) as error:
        raise ConfigError(f"{text} is no readable YAML mapping of metric names") from error
    return checked(listed, text, MetricNames)


def read_metrics(text: str, names: MetricNames | None, wall_s: float = math.nan) -> EngineMetrics:
    """Read a metrics page, in time that is linear in its length.

    Args:
        text: The page.
        names: What to look for; `None` tries the known engines.
        wall_s: Unix time, for pages whose samples carry times.

    Raises:
        MetricsError: If a quantity is not there; a missing one must not pass for 0.
    """
    choices = [names] if names else list(KNOWN.values())
    found: dict[str, list[Sample]] = {}
    wanted = frozenset[str]().union(*(choice.all for choice in choices))
    for number, sample in enumerate(samples(text, wanted)):
        if number == _MAX_SAMPLES:
            raise MetricsError(f"the metrics page has more than {_MAX_SAMPLES} such samples")
        if math.isfinite(sample.value):
            found.setdefault(sample.name, []).append(sample)
    missing = ""
    for choice in choices:
        metrics = _read(found, choice, wall_s)
        if isinstance(metrics, EngineMetrics):
            return metrics
        missing = missing or metrics
    if names is None:
        raise MetricsError(
            f"the metrics page has no {missing}, nor what {' or '.join(list(KNOWN)[1:])} has: "
            "name the engine or give a mapping file"
        )
    raise MetricsError(f"the metrics page has no {missing}: give a mapping file")


def _read(found: dict[str, list[Sample]], names: MetricNames, wall_s: float) -> EngineMetrics | str:
    """Return the metrics, or the first name that is missing."""
    oldest_s = math.inf

    def values(choice: tuple[str, ...]) -> list[float] | None:
        nonlocal oldest_s
        name = next((name for name in choice if name in found), None)
        if name is None:
            return None
        spoken = parts(found[name])
        for sample in spoken:
            if sample.time_s < oldest_s:
                oldest_s = sample.time_s
        counts = [max(0.0, sample.value) for sample in spoken]
        return counts if math.isfinite(sum(counts)) else None

    def total(values: list[float] | None) -> float | None:
        return sum(values) if values else None

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
    capacity = values(names.kv_capacity_tokens)
    if capacity is None:
        capacity = _sizes(names, found)
    age_s = wall_s - oldest_s if math.isfinite(oldest_s) and not math.isnan(wall_s) else 0.0
    return EngineMetrics(
        num_running=sum(running),
        num_waiting=sum(waiting),
        kv_cache_usage=min(1.0, sum(usage) / len(usage)),
        generated_tokens=total(generated),
        kv_capacity_tokens=total(capacity) or None,
        age_s=max(0.0, age_s),
    )


def _sizes(names: MetricNames, found: dict[str, list[Sample]]) -> list[float] | None:
    """Return the KV cache sizes that a page states in blocks, tokens; `None` if it does not."""
    for name in (name for name in names.cache_config if name in found):
        labels = [sample.labels for sample in parts(found[name])]
        return _products(
            [part.get("block_size", "") for part in labels],
            [part.get("num_gpu_blocks", "") for part in labels],
        )  # "None" until the engine has measured its memory
    for many, size in zip(names.num_blocks, names.block_tokens, strict=False):
        if many in found and size in found:
            blocks, tokens = parts(found[many]), parts(found[size])
            return _products([s.value for s in blocks], [s.value for s in tokens])
    return None


def _products(sizes: Iterable[float | str], counts: Iterable[float | str]) -> list[float] | None:
    try:
        products = [float(a) * float(b) for a, b in zip(sizes, counts, strict=True)]
    except ValueError:
        return None
    good = all(product > 0.0 for product in products) and math.isfinite(sum(products))
    return products if good else None
