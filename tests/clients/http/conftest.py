"""The emulated fleet and a router in front of it, each a process of its own, for all checks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import yaml

from .served import (
    KEY,
    LIMITED_KEY,
    NUM_REPLICAS,
    ROOT,
    SPEED,
    Served,
    free_ports,
    wait_for,
)


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    first = free_ports(NUM_REPLICAS + 3)
    engines = [f"http://127.0.0.1:{first + i}" for i in range(NUM_REPLICAS)]
    admin, url, router_admin = (f"http://127.0.0.1:{first + NUM_REPLICAS + i}" for i in range(3))
    keys = folder / "keys.yaml"
    keys.write_text(f"anyone: {KEY}\nlimited: {LIMITED_KEY}\n")
    keys.chmod(0o600)
    config = yaml.safe_load((ROOT / "examples" / "router.yaml").read_text())
    config["replicas"] = config["replicas"][:NUM_REPLICAS]
    for replica, engine in zip(config["replicas"], engines, strict=True):
        replica["url"] = engine
    config["listen"] |= {"port": first + NUM_REPLICAS + 1, "admin_port": first + NUM_REPLICAS + 2}
    config |= {
        "auth": {"keys_file": str(keys)},
        "tenants": {"limited": {"max_concurrent": 1}},
        "drain_s": 1.0,
        "health": {"interval_s": 0.2},
    }
    config["request"] |= {"max_hold_s": 0.5}
    path = folder / "router.yaml"
    path.write_text(yaml.safe_dump(config))
    program = [sys.executable, "-c", "from servegym.cli import main; main()", "serve"]
    replicas = ",".join(map(str, range(NUM_REPLICAS)))
    engine = [*program, "engine", "--replica", replicas, "--port", str(first)]
    engine += ["--admin-port", str(first + NUM_REPLICAS), "--speed", str(SPEED)]
    logs = [(folder / name).open("w") for name in ("engine.log", "router.log")]
    processes = []
    try:
        for command, log, ready in (
            (engine, logs[0], f"{engines[-1]}/health"),
            ([*program, "router", "--config", str(path)], logs[1], f"{url}/health"),
        ):
            process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)
            processes.append(process)
            wait_for(ready, process)
        yield Served(url, router_admin, engines, admin)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(20)
        for log in logs:
            log.close()
    said = (folder / "router.log").read_text()
    assert "Traceback" not in said, said
    assert KEY not in said


@pytest.fixture(autouse=True)
def all_well(request) -> Iterator[None]:
    """Leave the fleet as it was, whatever a check has done to it."""
    yield
    if "served" in request.fixturenames:
        served = request.getfixturevalue("served")
        served.fault("recover")
        served.until_idle()
