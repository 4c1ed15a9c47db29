"""The ten-task example of the HEFT paper, which every account of list scheduling uses."""

from __future__ import annotations

import pytest

from servegym.workflow.graph import Workflow, make_workflow

DURATION_S = [
    [14, 16, 9],
    [13, 19, 18],
    [11, 13, 19],
    [13, 8, 17],
    [12, 13, 10],
    [13, 16, 9],
    [7, 15, 11],
    [5, 11, 14],
    [18, 12, 20],
    [21, 7, 16],
]
TRANSFER_S = {
    (1, 2): 18,
    (1, 3): 12,
    (1, 4): 9,
    (1, 5): 11,
    (1, 6): 14,
    (2, 8): 19,
    (2, 9): 16,
    (3, 7): 23,
    (4, 8): 27,
    (4, 9): 23,
    (5, 9): 13,
    (6, 8): 15,
    (7, 10): 17,
    (8, 10): 11,
    (9, 10): 13,
}


@pytest.fixture
def classic() -> Workflow:
    return make_workflow(
        [f"T{i}" for i in range(1, 11)],
        ["P1", "P2", "P3"],
        DURATION_S,
        [(u - 1, v - 1) for u, v in TRANSFER_S],
        transfer_s=list(TRANSFER_S.values()),
        name="classic",
    )


@pytest.fixture
def independent() -> Workflow:
    """Three tasks without edges on two devices."""
    return make_workflow(["a", "b", "c"], ["p", "q"], [[4, 6], [3, 5], [8, 9]], [])
