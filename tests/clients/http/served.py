"""What the checks know of the servers that they use."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[3]
MODEL = "Llama-3.1-8B"
KEY, LIMITED_KEY = "sk-anyone-0123456789", "sk-limited-0123456789"
#: Engines run so much faster than real ones.
SPEED = 5.0
NUM_REPLICAS = 4


def free_ports(count: int) -> int:
    """Return the first of so many free ports in a row."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first = probe.getsockname()[1]
        try:
            taken = [socket.create_server(("127.0.0.1", first + i)) for i in range(count)]
        except OSError:
            continue
        for server in taken:
            server.close()
        return first


def fetch(url: str, body: object = None, headers: dict[str, str] | None = None) -> str:
    """GET a page, or POST a JSON body."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **(headers or {})}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=10) as page:
        return page.read().decode()


def wait_for(url: str, process: subprocess.Popen) -> None:
    """Wait until a server says 200; the first start compiles for a minute."""
    end_s = time.monotonic() + 300
    while time.monotonic() < end_s:
        assert process.poll() is None, "the server has ended"
        try:
            fetch(url)
        except (OSError, urllib.error.HTTPError):
            time.sleep(0.2)
        else:
            return
    raise TimeoutError(url)


class Served:
    """What a check needs.

    Attributes:
        url: Of the router, without `/v1`.
        engines: Of the replicas.
    """

    def __init__(self, url: str, admin: str, engines: list[str], engine_admin: str) -> None:
        self.url, self.admin, self.engines, self.engine_admin = url, admin, engines, engine_admin

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    def fault(self, kind: str, replicas=range(NUM_REPLICAS), value: float = 1.0) -> None:
        """Let the engines do something, or `recover`."""
        for replica in replicas:
            body = {"replica": replica, "kind": kind, "value": value}
            fetch(f"{self.engine_admin}/faults", body)

    def engine_states(self) -> list[dict]:
        return json.loads(fetch(f"{self.engine_admin}/state"))

    def state(self) -> dict:
        return json.loads(fetch(f"{self.admin}/state"))

    def metrics(self) -> str:
        return fetch(f"{self.url}/metrics", headers={"Authorization": f"Bearer {KEY}"})

    def until_idle(self) -> None:
        """Wait until no request is left in any engine; those that were left must be aborted."""
        for _ in range(200):
            if not any(s["num_streams"] + s["num_running"] for s in self.engine_states()):
                return
            time.sleep(0.05)
        raise AssertionError(f"still busy: {self.engine_states()}")
