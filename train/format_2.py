"""Folders of runs in format 2, which had a format for each problem: what they say today."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

FORMAT = 2
#: Names of problems there.
PROBLEMS = {"dispatcher": "dispatch", "order": "order", "scheduler": "workflow"}


def upgraded(problem: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what such a checkpoint holds, as one of today's would hold it.

    Raises:
        KeyError: If something is missing in it.
    """
    made: dict[str, Any] = {"lines": {}, "last": {}, **content}
    if problem == "dispatch":
        made |= {"stage": int(content["finished"]), "updates": [content["update"]]}
        made["episode_returns"] = torch.zeros(len(content["returns"]), dtype=torch.float64)
    elif problem == "order":
        here = content["search"][2]
        second = content["stage"] == 1
        made["updates"] = [content["generation"] - here, here] if second else [here, 0]
        best, first = content["losses"]
        made["best_scores"] = torch.tensor([best], dtype=torch.float64)
        made["first_scores"] = torch.tensor([first], dtype=torch.float64)
    else:
        made |= {"stage": int(content["searched"]) + int(content["finished"])}
        made["updates"] = [content["search"][2], content["update"]]
    return made
