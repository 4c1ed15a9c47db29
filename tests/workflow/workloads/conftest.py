"""Jobs of every family, drawn once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from servegym.workflow.workloads.registry import WORKLOADS, draw

TRACES = Path(__file__).parents[4] / "shared" / "data" / "traces"
#: Parameters that make a family quick to draw from, or without which it cannot.
QUICK = {"post-training": {"num_sequences": 32, "num_shards": 2}}


def write_records(folder: Path) -> None:
    """Write two small WfFormat files that share a program."""
    for name, count in (("fork", 3), ("chain", 2)):
        tasks = [
            {
                "name": f"{'split' if i == 0 else 'work'}_ID00000{i}",
                "id": f"t{i}",
                "parents": [] if i == 0 else ["t0"],
                "inputFiles": [] if i == 0 else ["f"],
                "outputFiles": ["f"] if i == 0 else [],
            }
            for i in range(count)
        ]
        times = [{"id": f"t{i}", "runtimeInSeconds": 10.0 + i} for i in range(count)]
        body = {
            "specification": {"tasks": tasks, "files": [{"id": "f", "sizeInBytes": 1000}]},
            "execution": {"tasks": times},
        }
        (folder / f"{name}.json").write_text(json.dumps({"name": name, "workflow": body}))


@pytest.fixture(scope="session")
def records_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    write_records(folder)
    return folder


@pytest.fixture(scope="session", params=list(WORKLOADS))
def family_jobs(request, records_folder):
    """Name of a family and some of its jobs."""
    params = dict(QUICK.get(request.param, {}))
    if request.param == "wfcommons":
        params["path"] = str(records_folder)
    return request.param, draw(request.param, np.random.default_rng(0), 40, **params)


@pytest.fixture(scope="session")
def weka_file():
    pytest.importorskip("pyarrow")
    file = TRACES / "weka_agentic_sessions_firsthalf.parquet"
    if not file.exists():
        pytest.skip("the extract of the WEKA traces is not at hand")
    return file


@pytest.fixture(scope="session")
def wfinstances_folder():
    pytest.importorskip("pyarrow")
    if not (TRACES / "wfinstances_nodes_le1000tasks.parquet").exists():
        pytest.skip("the extract of WfCommons is not at hand")
    return TRACES
