"""A job shop for the simulator of jobs, and its schedule from what the simulator did."""

from __future__ import annotations

import numpy as np

from servegym.typing import IntArray
from servegym.workflow.graph import Workflow
from servegym.workflow.job import Job, JobBuilder
from servegym.workflow.jobshop import require_job_shop
from servegym.workflow.online.policy import WorkflowPolicy
from servegym.workflow.online.run import run
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.spec import DeviceType, Episode, FleetSpec
from servegym.workflow.schedule import Schedule


def schedule_shop(workflow: Workflow, policy: WorkflowPolicy) -> Schedule:
    """Let an online policy schedule a job shop; all of its jobs are there at the beginning.

    Args:
        workflow: A job shop.
        policy: An online rule or a learned scheduler.

    Raises:
        ConfigError: If the workflow is no job shop.
    """
    require_job_shop(workflow, policy.name)
    spec = FleetSpec(tuple(DeviceType(name) for name in workflow.devices))
    jobs, tasks = shop_jobs(workflow)
    simulator = Simulator(spec, [Episode.of(jobs, np.arange(workflow.num_devices))])
    run(simulator, policy)
    stages = simulator.stages()
    device_idx = np.empty(workflow.num_tasks, np.int64)
    start_s, finish_s = np.empty(workflow.num_tasks), np.empty(workflow.num_tasks)
    device_idx[tasks] = stages["device"]
    start_s[tasks], finish_s[tasks] = stages["begin_s"], stages["finish_s"]
    return Schedule(workflow, device_idx, start_s, finish_s)


def shop_jobs(workflow: Workflow) -> tuple[list[Job], IntArray]:
    """Make a job of each chain.

    Returns:
        The jobs, and the task behind each of their stages, through all jobs.
    """
    g = workflow.graph
    first = np.flatnonzero(np.diff(g.pred_start) == 0)
    jobs, tasks = [], []
    for task in first.tolist():
        builder, last = JobBuilder("job-shop", workflow.devices), -1
        while True:
            duration_s = dict(zip(workflow.devices, g.duration_s[task].tolist(), strict=True))
            stage = builder.task(0, duration_s)
            if last >= 0:
                builder.edge(last, stage)
            last = stage
            tasks.append(task)
            if g.succ_start[task] == g.succ_start[task + 1]:
                break
            task = int(g.child[g.succ_start[task]])
        jobs.append(builder.build())
    return jobs, np.array(tasks)
