"""What a model costs that is split into stages: pipeline parallelism."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from servegym.assets.specs import ModelSpec
from servegym.costs.source import Evidence
from servegym.costs.step import StepCost
from servegym.errors import ConfigError

_ACTIVATION_BYTES = 2.0
#: Tensors of `tokens x hidden` that go from stage to stage: hidden states and their residual, which
#: vLLM's models of the Llama kind keep apart. Those that add them at once (GPT-J, OPT) send one.
_TENSORS = 2


class NetworkLink(NamedTuple):
    """A link between nodes, of each GPU: bytes a second one way, and seconds before the first."""

    bytes_per_s: float
    latency_s: float = 0.0


def stage_layers(layers: int, num_stages: int) -> tuple[int, ...]:
    """Split layers over stages as vLLM does (`get_pp_indices` in `vllm/distributed/utils.py`).

    What does not divide goes to the last stage but one and those before it, one layer each: the
    last has the output head, the first the embedding.

    Args:
        layers: Of the model.
        num_stages: Pipeline-parallel degree.

    Raises:
        ConfigError: If a stage would have no layer.
    """
    if not 1 <= num_stages <= layers:
        raise ConfigError(
            f"pp must be from 1 to the {layers} layers of the model, got {num_stages}"
        )
    each, more = divmod(layers, num_stages)
    first = num_stages - 1 - more
    return tuple(each + (first <= stage < num_stages - 1) for stage in range(num_stages))


@dataclass(frozen=True)
class PipelineCost:
    """Seconds of a step on `pp` stages, each of `whole.tp` GPUs.

    A stage pays the time outside kernels itself: its workers prepare their own inputs.

    Attributes:
        whole: The step cost of one stage with all layers.
        pp: Number of stages.
        link: Between stages on different nodes; None: they are on one node, and a transfer takes
            what an all-reduce of as many bytes over two GPUs takes, in which either sends its
            bytes to the other. Transfers were not measured either way.
        stages: The step cost of each stage's layers; all but the last go without output head.
    """

    whole: StepCost
    pp: int = 1
    link: NetworkLink | None = None
    stages: tuple[StepCost, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.link and (self.link.bytes_per_s <= 0.0 or self.link.latency_s < 0.0):
            raise ConfigError(
                "the link between stages must have more than 0 bytes/s and at least 0 s of "
                f"latency, got {self.link.bytes_per_s:g} and {self.link.latency_s:g}"
            )
        counts = stage_layers(self.whole.model.layers, self.pp)
        starts = [sum(counts[:stage]) for stage in range(self.pp)]
        models = [
            part_of(self.whole.model, start, start + count)
            for start, count in zip(starts, counts, strict=True)
        ]
        object.__setattr__(self, "stages", tuple(replace(self.whole, model=one) for one in models))
        if self.pp > 1:
            self.handover_s(1.0)  # refuse GPUs without collectives over two

    def stage_s(self, **step: float) -> tuple[float, ...]:
        """Seconds of each stage's own work in a step; arguments as of `StepCost.terms`."""
        split = [one.terms(**step) for one in self.stages]
        for terms in split[:-1]:
            del terms["output head"]
        return tuple(sum(terms.values()) for terms in split)

    def handover_s(self, tokens: float) -> float:
        """Seconds from the end of one stage to the start of the next.

        Each tensor-parallel GPU sends its share of the activations to its counterpart; these
        gather the whole (`send_tensor_dict` in `vllm/distributed/parallel_state.py`).
        """
        if self.pp == 1:
            return 0.0
        op, tp = self.whole.operators, self.whole.tp
        one = _ACTIVATION_BYTES * tokens * self.whole.model.hidden
        if self.link:
            sent_s = self.link.latency_s + _TENSORS * one / tp / self.link.bytes_per_s
        else:
            sent_s = _TENSORS * op.all_reduce_s(one / tp, 2)
        return sent_s + (_TENSORS * op.all_gather_s(one, tp) if tp > 1 else 0.0)

    def latency_s(self, **step: float) -> float:
        """Seconds that one batch takes through all stages; arguments as of `StepCost.terms`."""
        handovers_s = (self.pp - 1) * self.handover_s(step["tokens"])
        return sum(self.stage_s(**step)) + handovers_s

    def round_s(self, batches: int, **step: float) -> float:
        """Seconds from token to token of each sequence while equal batches go round.

        vLLM V1 keeps up to `pp` batches in flight, and a sequence is in the next one only after
        its last has left the last stage (`EngineCore.step_with_batch_queue`). In a closed loop of
        equal batches a round is then the longer of two: one batch through all stages, or all
        batches through the slowest stage.

        Args:
            batches: In flight, from 1 to `pp`.
            step: Each of them, as in `StepCost.terms`.

        Raises:
            ConfigError: If there are more batches than stages, or none.
        """
        if not 1 <= batches <= self.pp:
            raise ConfigError(f"from 1 to pp = {self.pp} batches are in flight, got {batches}")
        return max(self.latency_s(**step), batches * max(self.stage_s(**step)))

    def kv_capacity_tokens(self, memory_fraction: float = 0.9) -> int:
        """KV tokens that fit on the fullest stage: all stages have as many blocks as that one.

        Raises:
            ConfigError: If a stage's weights do not fit.
        """
        return min(self.stage_kv_tokens(memory_fraction))

    def stage_kv_tokens(self, memory_fraction: float = 0.9) -> tuple[int, ...]:
        """KV tokens that fit beside the weights of each stage.

        Raises:
            ConfigError: If a stage's weights do not fit.
        """
        fit = []
        for number, one in enumerate(self.stages):
            headless = number < self.pp - 1
            model = one.model.model_copy(update={"vocab": 0}) if headless else one.model
            shard = replace(one.shard, model=model)
            try:
                fit.append(shard.kv_capacity_tokens(one.gpu.memory_bytes, memory_fraction))
            except ConfigError as error:
                if self.pp == 1:
                    raise
                raise ConfigError(
                    f"stage {number + 1} of {self.pp}: {error}, or raise pp"
                ) from error
        return tuple(fit)

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """What stands behind the operators of the stages, and behind the transfers."""
        if self.pp == 1:
            return self.whole.evidence
        note = "not measured: " + (
            "bytes over the rate of the link" if self.link else "as an all-reduce over two GPUs"
        )
        return (*self.whole.evidence, Evidence("transfer between stages", "prior", note))

    @property
    def status(self) -> str:
        """`extrapolated` with several stages, as no transfer was measured; else the step's."""
        return self.whole.status if self.pp == 1 else "extrapolated"


def part_of(model: ModelSpec, start: int, end: int) -> ModelSpec:
    """The layers from `start` to before `end`, with embedding if first and output head if last.

    Where in a model its layers with a window are is not known here: they are spread evenly.
    """
    if end - start == model.layers:
        return model
    layers = end - start
    dense = max(min(end, model.dense_layers) - start, 0)
    windows = (
        end * model.window_layers // model.layers - start * model.window_layers // model.layers
    )
    part = model.model_copy(
        update={
            "layers": layers,
            "dense_layers": dense,
            "window_layers": windows,
            "kv_bytes_per_token": model.kv_bytes_per_token * layers // model.layers,
        }
    )
    ends = (start == 0) + (end == model.layers)
    num_params = layer_params(part) + ends * model.vocab * model.hidden
    return part.model_copy(update={"num_params": float(num_params)})


def layer_params(model: ModelSpec) -> int:
    """Count the weights of all layers' matrices."""
    m = model
    width = m.heads * m.head_dim
    if m.latent_dim:
        query_in = m.latent_query_dim or m.hidden
        attention = m.hidden * (m.latent_dim + m.latent_rope_dim + m.latent_query_dim)
        attention += query_in * m.heads * (m.head_dim + m.latent_rope_dim)
        attention += m.latent_dim * 2 * width + width * m.hidden
    else:
        attention = m.hidden * (2 * width + 2 * m.kv_heads * m.head_dim)
    beside = m.num_experts + m.ffn_matrices * m.shared_ffn_dim if m.num_experts else 0
    dense = m.dense_layers if m.num_experts else m.layers
    return (
        m.layers * attention
        + dense * m.ffn_matrices * m.hidden * m.ffn_dim
        + m.expert_layers * m.hidden * beside
        + m.expert_params
    )
