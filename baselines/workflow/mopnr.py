"""Most operations remaining."""

from __future__ import annotations

import numpy as np

from servegym.baselines.workflow.dispatching import dispatch, remaining
from servegym.workflow.graph import Workflow
from servegym.workflow.schedule import Schedule


def mopnr(workflow: Workflow) -> Schedule:
    """Start an operation of the job with the most operations left."""
    return dispatch(workflow, -remaining(workflow, np.ones(workflow.num_tasks)), "mopnr")
