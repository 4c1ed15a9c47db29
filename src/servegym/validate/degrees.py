"""Over how many GPUs, and how, published rows spread a model.

The dump of InferenceX in AIConfigurator's sample multiplies the degrees of tensor and expert
parallelism to the number of GPUs, though both are of the same GPUs: 90 measurements are in it
twice, equal to the last digit, once on n and once on n x n GPUs. Its row ids hold the degrees that
InferenceX configures.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from servegym.errors import ConfigError

_DUMP = "aic_inferencex"
#: `tp8_ep8` before the number of a row; degrees may have been written as floats, `tp8_0_ep8_0`.
_CONFIGURED = re.compile(r"_tp(\d+)(?:_0)?_ep(\d+)(?:_0)?_\d+$")
_CONFIG_ID = re.compile(r"_cfg\d+$")


@dataclass(frozen=True)
class Degrees:
    """How a replica spreads a model.

    Attributes:
        tp: Tensor-parallel degree of attention.
        ranks: Data-parallel ranks of attention that share the experts.
        expert_groups: Groups of tensor-parallel GPUs that split the experts.
        pp: Stages of so many GPUs that layers are split over.
    """

    tp: int
    ranks: int = 1
    expert_groups: int = 1
    pp: int = 1


def degrees(text: dict[str, str]) -> Degrees:
    """Read the degrees of a row.

    Args:
        text: All cells of the row.

    Raises:
        ConfigError: If it says nothing clear, or what the simulator lacks.
    """
    if not text["tp"].isdigit():
        raise ConfigError("tensor-parallel degree not given")
    pp = max(1, _whole(text["pp"]))
    if pp == 1 and text["file"] == _DUMP and _whole(text["ep"]) > 0:
        found = _of_dump(text)
        if found is not None:
            return found
    tp, ep = int(text["tp"]), _whole(text["ep"])
    if _whole(text["dp"]) > 1:
        raise ConfigError("data-parallel attention or several replicas")
    if ep > tp:
        raise ConfigError("expert parallelism beyond the tensor-parallel degree")
    if text["gpu_count"].isdigit() and int(text["gpu_count"]) not in (0, tp * pp):  # 0: not known
        stated = f"tp {tp}" if pp == 1 else f"tp {tp} and pp {pp}"
        raise ConfigError(f"{text['gpu_count']} GPUs for {stated}: parallelism not clear")
    return Degrees(tp, expert_groups=max(1, ep), pp=pp)


def _of_dump(text: dict[str, str]) -> Degrees | None:
    """Degrees of a row of the dump, if its id tells how they were recorded."""
    tp, dp, ep = (_whole(text[name]) for name in ("tp", "dp", "ep"))
    configured = _CONFIGURED.search(text.get("source", ""))
    if configured is not None:
        gpus, ep = int(configured[1]), int(configured[2])
    elif _CONFIG_ID.search(text.get("source", "")) and text["gpu_count"].isdigit():
        recorded = int(text["gpu_count"])
        # recorded as t x t GPUs either by tp alone or by tp and dp; attention is tensor parallel
        gpus = tp if tp > 1 and dp > 1 else recorded // ep
        ep = recorded // gpus
    else:
        return None
    if tp == 1 and dp > 1:
        return Degrees(1, ranks=gpus)
    return Degrees(gpus, expert_groups=ep)


def _whole(text: str) -> int:
    try:
        return int(float(text))
    except ValueError:
        return 0
