from __future__ import annotations

import pytest

from servegym.errors import ConfigError
from servegym.validate.degrees import Degrees, degrees


def cells(**changed):
    row = {"file": "paper", "source": "", "notes": "", "gpu_count": "", "tp": "8", "pp": "1"}
    return row | {"dp": "1", "ep": "1"} | changed


def dump(ident, gpu_count, tp, dp, ep):
    row = {"gpu_count": str(gpu_count), "tp": str(tp), "dp": str(dp), "ep": str(ep)}
    return cells(file="aic_inferencex", source=f"sample.csv; id=dsr1_{ident}", **row)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # as configured: 8 GPUs, the same for attention and experts
        (dump("c64_tp8_ep8_955", 64, 64, 1, 8), Degrees(8, expert_groups=8)),
        (dump("c64_tp8_0_ep8_0_1257", 8, 8, 1, 8), Degrees(8, expert_groups=8)),
        (dump("c64_tp2_ep2_7", 4, 4, 1, 2), Degrees(2, expert_groups=2)),
        (dump("c64_tp8_ep1_9", 8, 8, 1, 1), Degrees(8)),
        # without degrees in the id the number of GPUs is their product
        (dump("c64_cfg177", 64, 64, 1, 8), Degrees(8, expert_groups=8)),
        (dump("c64_cfg615", 16, 16, 1, 4), Degrees(4, expert_groups=4)),
        (dump("c16_cfg635", 16, 4, 4, 16), Degrees(4, expert_groups=4)),
        (dump("c512_cfg735", 4, 2, 2, 4), Degrees(2, expert_groups=2)),
        (dump("c4_cfg733", 4, 4, 1, 1), Degrees(4)),
        # attention of every GPU for requests of its own
        (dump("c256_tp8_ep8_2011", 64, 1, 64, 8), Degrees(1, ranks=8)),
        (dump("c256_tp8_0_ep8_0_1259", 8, 1, 8, 8), Degrees(1, ranks=8)),
        (dump("c256_cfg191", 64, 1, 64, 8), Degrees(1, ranks=8)),
        (dump("c64_tp4_ep1_11", 4, 1, 4, 1), Degrees(1, ranks=4)),
        # ids without a degree of experts
        (dump("c224_tp4_epnone_1", 4, 4, 1, 4), Degrees(4, expert_groups=4)),
        (cells(gpu_count="8"), Degrees(8)),
        (cells(gpu_count="0", dp="", ep=""), Degrees(8)),
        (cells(ep="4"), Degrees(8, expert_groups=4)),
        (cells(pp="2", gpu_count="16"), Degrees(8, pp=2)),
    ],
)
def test_degrees_are_those_of_the_gpus(row, expected):
    assert degrees(row) == expected


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"tp": "n/a"}, "degree not given"),
        ({"pp": "2", "gpu_count": "8"}, "8 GPUs for tp 8 and pp 2"),
        ({"dp": "2"}, "data-parallel"),
        ({"ep": "16"}, "beyond"),
        ({"gpu_count": "16"}, "16 GPUs for tp 8"),
    ],
)
def test_other_sources_are_taken_at_their_word_or_refused(changed, reason):
    with pytest.raises(ConfigError, match=reason):
        degrees(cells(**changed))
