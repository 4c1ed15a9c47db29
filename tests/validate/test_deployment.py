"""Workers as notes of real rows describe them."""

from __future__ import annotations

import pytest

from servegym.errors import ConfigError
from servegym.validate.degrees import Degrees
from servegym.validate.deployment import Deployment, Pool, deployment, is_disaggregated, twins

INFERENCEX = (
    "disagg; disagg P=1x(tp1,dp4,ep4) D=4x(tp8,dp1,ep8); InferenceX/InferenceMAX dump (lengths "
    "random in [0.8,1.0]x nominal); moe_quant=nvfp4"
)
NOT_COUNTED = INFERENCEX.replace("P=1x(tp1,dp4", "P=x(tp4,dp1").replace("D=4x", "D=x")
DSTACK = (
    "PD disaggregation 1P3D; 8xH200 node; random lengths up to isl/osl (mean in=2046, out=62; "
    "early EOS); TP=2 per worker (README)"
)
MOONCAKE = "1P1D disaggregated TP8+TP4, chunked prefill off"


def cells(notes, **others):
    return {"notes": notes, "gpu_count": "", **others}


@pytest.mark.parametrize(
    ("notes", "gpus", "prefill", "decode"),
    [
        (INFERENCEX, "36", Pool(1, Degrees(1, ranks=4)), Pool(4, Degrees(8, expert_groups=8))),
        (DSTACK, "8", Pool(1, Degrees(2)), Pool(3, Degrees(2))),
        (MOONCAKE, "12", Pool(1, Degrees(8)), Pool(1, Degrees(4))),
    ],
)
def test_workers_are_read_from_notes(notes, gpus, prefill, decode):
    assert is_disaggregated(notes)
    assert deployment(cells(notes, gpu_count=gpus)) == Deployment(prefill, decode)


def test_a_row_that_does_not_count_its_workers_has_those_of_its_twin():
    same = {"file": "dump", "isl": "1024", "ttft_mean": "130.1", "tpot_mean": "6.3"}
    rows = [
        cells(NOT_COUNTED, **same, gpu_count="12"),
        cells(INFERENCEX, **same, gpu_count="36"),
        cells(NOT_COUNTED, **same | {"tpot_mean": "6.4"}),
    ]
    found = twins(rows)
    assert found == [INFERENCEX, INFERENCEX, ""]
    assert deployment(rows[0] | {"twin": found[0]}) == deployment(rows[1])
    with pytest.raises(ConfigError, match="number of workers that is not given"):
        deployment(rows[2] | {"twin": found[2]})


@pytest.mark.parametrize(
    ("notes", "reason"),
    [
        ("disagg, somehow", "workers that are not described"),
        ('1P1D; lengths "random"', "workers that are not described"),
        (INFERENCEX.replace("tp1,dp4", "tp2,dp4"), "over tensor-parallel ranks"),
        (INFERENCEX.replace("P=1x", "P=0x"), "without workers of one kind"),
    ],
)
def test_what_is_not_clear_is_refused(notes, reason):
    with pytest.raises(ConfigError, match=reason):
        deployment(cells(notes))


def test_workers_must_have_as_many_gpus_as_the_row_says():
    with pytest.raises(ConfigError, match="40 GPUs for workers of 36"):
        deployment(cells(INFERENCEX, gpu_count="40"))


def test_other_notes_tell_of_no_workers():
    assert not is_disaggregated("static batch; bs 1p")
