"""Published measurements: rows of a table, and what of each can be replayed."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from servegym.assets.specs import gpu, model
from servegym.costs.source import Routing
from servegym.errors import ConfigError, WorkloadError
from servegym.validate.degrees import Degrees, degrees
from servegym.validate.deployment import deployment, is_disaggregated, twins
from servegym.validate.engine import EngineSetup
from servegym.validate.limits import stated_limits
from servegym.validate.names import (
    KERNELS,
    checkpoint_format,
    engine_family,
    known_gpu,
    known_model,
    known_precision,
)
from servegym.validate.reception import Reception, prefill_together, reception
from servegym.validate.recipes import recipe
from servegym.workloads.records import columns_of, records

_COLUMNS = (
    *("row_id", "file", "quality", "engine", "model", "precision_w", "gpu", "gpu_count"),
    *("tp", "pp", "dp", "ep", "isl", "osl", "concurrency", "request_rate", "notes"),
    *("tput_out", "ttft_mean", "tpot_mean", "itl_mean"),
)
Loop = Literal["closed", "open", "batch", "offline"]
Lengths = Literal["fixed", "shortened", "spread"]


@dataclass(frozen=True)
class FamilyLimits:
    """Settings of an engine family that publications leave out: its defaults on a large GPU.

    Attributes:
        max_num_seqs: Running requests.
        max_num_batched_tokens: Token budget of a step.
        memory_fraction: Share of GPU memory the engine may use.
        host_sequence_s: Time between steps in which the GPU waits for the CPU, for each sequence.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    memory_fraction: float
    host_sequence_s: float = 0.0


#: Of vLLM's scheduler where steps do not overlap: to form a step of decodes, take its results in
#: and encode them takes 9.0 to 9.4 us a sequence (0.32, 64 to 256; `benchmarks/vllm_host.py`).
_VLLM_HOST_S = 9.3e-6
#: Of vLLM before 0.6: its makers saw 29 % of the time go into scheduling and 38 % into the GPU on
#: Llama-3-8B, one H100 and ShareGPT (vLLM blog, 2024-09-05); a step of 256 sequences of 330 tokens
#: takes that GPU 13 ms here.
_VLLM_V0_HOST_S = 38e-6
#: Of engines in Python that launch the kernels of a prefill one by one, a layer of latent attention
#: and experts: one token of DeepSeek-V3 took SGLang 82.6 ms, and 23.1 ms from a CUDA graph
#: (sgl-project/sglang, pull request 12160); it has 61 layers.
_EAGER_LATENT_LAYER_S = 82.6e-3 / 61
_LAUNCH_ONE_BY_ONE = ("sglang", "trtllm")

#: vLLM V1 takes 8,192 tokens a step on GPUs of 70 GB and more, 2,048 on others (below), V0 the
#: longest context of the model, 8,192 being the common one; trtllm-bench 2,048 sequences and 8,192
#: tokens; SGLang at least 2,048 requests and chunks by the memory of the GPU (below).
FAMILIES = {
    "vllm": FamilyLimits(256, 8192, 0.9),
    "vllm-sync": FamilyLimits(256, 8192, 0.9, _VLLM_HOST_S),
    "vllm-v0": FamilyLimits(256, 8192, 0.9, _VLLM_V0_HOST_S),
    # its executor is written in Python too; never measured
    "trtllm": FamilyLimits(2048, 8192, 0.95, _VLLM_HOST_S),
    "sglang": FamilyLimits(2048, 8192, 0.88),
    "tgi": FamilyLimits(256, 4096, 0.9),
    "deepspeed": FamilyLimits(256, 2048, 0.9),
}
#: In the notes of rows whose lengths are drawn from 0.8 to 1 of the nominal ones.
_SHORTENED = "random in ["
#: And where answers ended before their nominal length.
_MEANS = re.compile(r"mean in=(\d+), out=(\d+)")
#: Benchmarks send random tokens. AIConfigurator too takes a power law if not told more.
_ROUTING: Routing = "skewed"
_LARGE_GPU_BYTES = 70e9
#: SGLang's chunked_prefill_size below so many bytes of GPU memory (server_args.py).
_SGLANG_CHUNKS = ((35 * 2**30, 2048), (60 * 2**30, 4096), (160 * 2**30, 8192), (math.inf, 16384))


@dataclass(frozen=True)
class Row:
    """One published measurement of an engine.

    Attributes:
        row_id: Of the table.
        source: Its `file` column; one file holds the runs of two laboratories, told apart.
        quality: Grade, see the table's notes.
        engine: As published.
        engine_version: As published.
        model: As published.
        precision: Of the weights, as published.
        gpu: As published.
        notes: As collected.
        measured: `tpot_s`, `ttft_s`, `output_tokens_per_s`, `e2e_s`: those that were published.
        text: All cells.
    """

    row_id: str
    source: str
    quality: str
    engine: str
    engine_version: str
    model: str
    precision: str
    gpu: str
    notes: str
    measured: dict[str, float]
    text: dict[str, str]


@dataclass(frozen=True)
class Experiment:
    """What a row measured, as the simulator can replay it.

    Attributes:
        setup: The engine; where others prefill for it, one that decodes.
        family: `vllm`, `trtllm`, ...
        loop: `closed` at a concurrency, `open` at a rate, `batch` of so many requests at once,
            `offline` with all requests queued.
        prompt_tokens: Mean.
        output_tokens: Mean.
        lengths: `fixed`, `shortened` (uniform in 0.8 to 1 of nominal) or `spread` (exponential).
        concurrency: Clients or batch size.
        rate_rps: Of the open loop.
        num_requests: To replay.
        num_workers: Engines.
        prefill: Those that prefill for them, if there are any.
        num_prefill: How many.
        reception: When their schedulers see a request.
    """

    setup: EngineSetup
    family: str
    loop: Loop
    prompt_tokens: float
    output_tokens: float
    lengths: Lengths
    concurrency: int = 0
    rate_rps: float = 0.0
    num_requests: int = 0
    num_workers: int = 1
    prefill: EngineSetup | None = None
    num_prefill: int = 0
    reception: Reception = field(default_factory=Reception)


def read_published(path: Path) -> list[Row]:
    """Read a table of published measurements.

    Raises:
        WorkloadError: If the file is no such table.
    """
    if not path.is_file():
        raise WorkloadError(f"no file at {path}: give the path of a table of measurements (CSV)")
    texts = []
    for line, found in records(path):
        record = columns_of(f"{path.name}, line {line}", found)
        missing = [name for name in _COLUMNS if name not in record]
        if missing:
            raise WorkloadError(
                f"{path.name} is no table of published measurements: it has no column {missing[0]}"
            )
        text = {str(key): str(value or "").strip() for key, value in record.items()}
        texts.append(text | {"row_id": text["row_id"] or str(line)})
    rows = []
    for text, twin in zip(texts, twins(texts), strict=True):
        rows.append(
            Row(
                row_id=text["row_id"],
                source=_source(text),
                quality=text["quality"],
                engine=text["engine"],
                engine_version=text.get("engine_version", ""),
                model=text["model"],
                precision=text["precision_w"],
                gpu=text["gpu"],
                notes=text["notes"],
                measured=_measured(text),
                text=text | {"twin": twin},
            )
        )
    if not rows:
        raise WorkloadError(f"{path.name} has no rows")
    return rows


def experiment(row: Row) -> Experiment:
    """Say how to replay a row.

    Raises:
        ConfigError: If that is not possible; the message is the reason.
    """
    text = row.text
    if row.quality in ("X", "Q"):
        raise ConfigError(f"graded {row.quality}: inconsistent or limited by its queue")
    if not row.measured:
        raise ConfigError("no TPOT, TTFT, throughput or latency was published")
    workers = deployment(text) if is_disaggregated(row.notes) else None
    spread = degrees(text) if workers is None else workers.decode.degrees
    _check_degrees(row, [spread] if workers is None else [spread, workers.prefill.degrees])
    family = engine_family(row.engine, row.engine_version, row.gpu)
    prompt, output = _mean_lengths(text)
    loop, concurrency, rate, count = _loop(row, prompt + output)
    setup = _setup(row, family, spread, concurrency)
    floor_s = _read_weights_s(setup)
    per_token_s = row.measured.get("tpot_s", math.inf)
    if concurrency and "output_tokens_per_s" in row.measured:
        per_token_s = min(per_token_s, concurrency / row.measured["output_tokens_per_s"])
    if per_token_s < floor_s:
        raise ConfigError("inconsistent: a token takes less than reading the weights once")
    plan = Experiment(
        setup=setup,
        family=family,
        loop=loop,
        prompt_tokens=max(1.0, prompt),
        output_tokens=max(1.0, output),
        lengths=_lengths(row),
        concurrency=concurrency,
        rate_rps=rate,
        num_requests=count,
        reception=reception(family, row.engine_version, text, setup.model, setup.tp),
    )
    if workers is None:
        return plan
    return replace(
        plan,
        num_workers=workers.decode.count,
        prefill=_setup(row, family, workers.prefill.degrees, concurrency),
        num_prefill=workers.prefill.count,
    )


def _setup(row: Row, family: str, spread: Degrees, concurrency: int) -> EngineSetup:
    """Return the engine of a row: the limits that its notes state, else its family's defaults."""
    stated = stated_limits(row.notes)
    gpu_name, precision = known_gpu(row.gpu), known_precision(row.precision)
    limits = FAMILIES[family.removesuffix("-rocm")]
    name = family.removesuffix("-rocm").removesuffix("-sync")
    budget = limits.max_num_batched_tokens
    memory_bytes = gpu(gpu_name).memory_bytes
    if name == "vllm" and memory_bytes < _LARGE_GPU_BYTES:
        budget = 2048
    elif name == "sglang":
        budget = next(size for limit, size in _SGLANG_CHUNKS if memory_bytes < limit)
    script = recipe(family, row.engine_version, row.text, known_model(row.model), spread.tp)
    seqs = stated.max_num_seqs or max(limits.max_num_seqs, concurrency)
    if script.max_num_batched_tokens:
        budget = script.max_num_batched_tokens
        seqs = min(seqs, budget)
    rules = KERNELS.get(name, "vllm")
    if rules == "vllm-v0" and stated.chunked_prefill:
        rules = "vllm"  # steps of chunks and decodes, as V1 forms them
    return EngineSetup(
        gpu=gpu_name,
        model=known_model(row.model),
        tp=spread.tp,
        pp=spread.pp,
        expert_ranks=spread.ranks,
        together=prefill_together(family, row.text, known_model(row.model), spread.ranks),
        precision=checkpoint_format(row.precision, row.model, family),
        engine=rules,
        expert_groups=spread.expert_groups,
        routing=_ROUTING,
        kv_precision=script.kv_precision or _kv_precision(row, family, precision),
        max_num_seqs=seqs,
        max_num_batched_tokens=max(stated.max_num_batched_tokens or budget, seqs),
        computes_once=rules == "trtllm" and script.max_num_batched_tokens is not None,
        block_size=stated.block_size or 16,
        num_blocks=stated.num_blocks,
        memory_fraction=stated.memory_fraction or limits.memory_fraction,
        separate_attention=family not in ("vllm", "vllm-sync"),
        host_sequence_s=limits.host_sequence_s,
        eager_layer_s=_eager_layer_s(name, known_model(row.model)),
        chunked_prefill=stated.chunked_prefill is not False,
        prefix_caching=stated.prefix_caching is True,
    )


def _eager_layer_s(engine: str, model_name: str) -> float:
    """Seconds to launch a layer of a prefill, 0 where nobody has measured it."""
    measured = engine in _LAUNCH_ONE_BY_ONE and model(model_name).latent_dim > 0
    return _EAGER_LATENT_LAYER_S if measured else 0.0


def _mean_lengths(text: dict[str, str]) -> tuple[float, float]:
    """Return the mean lengths, in tokens; those that the notes state before the nominal ones."""
    means = _MEANS.search(text["notes"])
    prompt, output = means.groups() if means else (text["isl"], text["osl"])
    lengths = _number(prompt), _number(output)
    if lengths[0] is None or lengths[1] is None:
        raise ConfigError(f"lengths are not given: {text['isl'] or '-'}/{text['osl'] or '-'}")
    return lengths[0], lengths[1]


def _read_weights_s(setup: EngineSetup) -> float:
    """Seconds to read the weights that one token touches, at the GPU's peak bandwidth."""
    arch = model(setup.model)
    # of the embedding one row is read
    params = arch.num_params - arch.vocab * arch.hidden - arch.expert_params
    if arch.num_experts:
        active = arch.expert_params * arch.active_experts / arch.num_experts
        params += active / setup.expert_ranks
    cost = setup.cost()
    return params * cost.weight_bytes / (cost.gpu.memory_bytes_per_s * setup.tp)


def _kv_precision(row: Row, family: str, precision: str) -> str:
    """Return the stated precision of the KV cache, else the engine's default."""
    stated = row.text.get("precision_kv", "")
    if stated:
        return known_precision(stated)
    # NVIDIA's fp8 and fp4 checkpoints carry scales for an fp8 KV cache
    return "fp8" if family == "trtllm" and precision != "bf16" else "bf16"


def _check_degrees(row: Row, found: list[Degrees]) -> None:
    if "attention dp" in row.notes.lower() and known_is_moe(row.model):
        raise ConfigError("attention data-parallel with experts of unknown parallelism")
    if any(one.ranks > 1 for one in found) and not known_is_moe(row.model):
        raise ConfigError("several replicas")


def known_is_moe(label: str) -> bool:
    """Whether a model label names a known mixture of experts."""
    try:
        return model(known_model(label)).num_experts > 0
    except ConfigError:
        return False


def _loop(row: Row, tokens: float) -> tuple[Loop, int, float, int]:
    """Return the kind of load, concurrency, rate and number of requests."""
    notes, rate_text = row.notes.lower(), row.text["request_rate"]
    concurrency = _number(row.text["concurrency"])
    if concurrency is not None and concurrency >= 1:
        clients = int(concurrency)
        at_once = ("static batch", "first-token latency", "all requests", "sent at once")
        if any(mark in notes for mark in at_once) or re.match(r"batch \d", notes):
            return "batch", clients, 0.0, clients
        return "closed", clients, 0.0, max(2 * clients, min(10 * clients, 20_000))
    stated = re.search(r"n=(\d+)|(\d+) (?:sharegpt )?prompts|(?:sharegpt )(\d+) prompts", notes)
    count = int(next(g for g in stated.groups() if g)) if stated else 0
    if rate_text.lower().startswith("inf"):
        # as in NVIDIA's benchmark instructions: more requests where they are short
        by_length = ((256, 30_000), (3_000, 3_000), (6_000, 1_500), (math.inf, 1_000))
        default = next(n for limit, n in by_length if tokens <= limit)
        return "offline", 0, 0.0, count or default
    rate = _number(rate_text.split(" ")[0].lstrip("~"))
    if rate is None or rate <= 0:
        raise ConfigError("neither concurrency nor request rate given")
    return "open", 0, rate, count or 300


def _lengths(row: Row) -> Lengths:
    notes = row.notes.lower()
    if _SHORTENED in notes:
        return "shortened"
    if any(mark in notes for mark in ("sharegpt", "trace", "means", "per-request")):
        return "spread"
    return "fixed"


def _source(text: dict[str, str]) -> str:
    return "nvidia_gap_analysis" if "gap-analysis" in text["notes"] else text["file"]


def _measured(text: dict[str, str]) -> dict[str, float]:
    found = {}
    for name, columns, unit in (
        ("tpot_s", ("tpot_mean", "tpot_p50", "itl_mean"), 1e-3),
        ("ttft_s", ("ttft_mean", "ttft_p50"), 1e-3),
        ("e2e_s", ("e2e_mean", "e2e_p50"), 1e-3),
        ("output_tokens_per_s", ("tput_out",), 1.0),
    ):
        values = [_number(text.get(column, "")) for column in columns]
        value = next((v for v in values if v is not None and v > 0), None)
        if value is not None:
            found[name] = value * unit
    if _SHORTENED in text["notes"].lower() and {"tpot_s", "ttft_s", "e2e_s"} <= found.keys():
        # an end computed from the nominal length, not that of the requests, was not measured
        nominal_s = found["ttft_s"] + found["tpot_s"] * ((_number(text["osl"]) or 1.0) - 1.0)
        if math.isclose(found["e2e_s"], nominal_s, rel_tol=2e-3):
            del found["e2e_s"]
    return found


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
