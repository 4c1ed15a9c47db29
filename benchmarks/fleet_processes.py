"""The processes of a live benchmark: emulated engines, the router, nginx; what they use."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import yaml

_SERVEGYM = (sys.executable, "-c", "from servegym.cli import main; main()")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


#: Where ports are looked for; the system gives those above to connections that go out.
_PORTS = range(10_000, 32_768)
#: What keeps ports for this process.
_marks: list[socket.socket] = []


def free_ports(count: int) -> list[int]:
    """Reserve ports in a row, for the life of this process.

    A port that is only found free may be gone when the process that is to listen there has started,
    seconds later: to a connection that goes out, or to another benchmark, whose server then answers
    in place of one's own until it ends. So each port is marked by a name of Linux' own for sockets,
    which no two processes can have, and lies where no connection that goes out begins.
    """
    while True:
        base = random.randrange(_PORTS.start, _PORTS.stop - count)
        found: list[socket.socket] = []
        try:
            for port in range(base, base + count):
                found.append(mark := socket.socket(socket.AF_UNIX))
                mark.bind(f"\0servegym-benchmark-{port}")
                with socket.socket() as one:
                    one.bind(("127.0.0.1", port))
        except OSError:
            for mark in found:
                mark.close()
            continue
        _marks.extend(found)
        return list(range(base, base + count))


def get(url: str, timeout_s: float = 5.0) -> str:
    """Fetch a page."""
    with urllib.request.urlopen(url, timeout=timeout_s) as response:
        return response.read().decode()


def post(url: str, body: Mapping[str, object], timeout_s: float = 10.0) -> tuple[int, str]:
    """Send an object; return status and answer."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def metric(page: str, name: str) -> float:
    """Add up the samples of a metric, or of its samples with the labels given with it."""
    labels = "" if "{" in name else r"(?:{[^}]*})?"
    found = re.findall(rf"^{re.escape(name)}{labels} (\S+)$", page, re.MULTILINE)
    return sum(map(float, found))


def quantile(page: str, name: str, share: float) -> float:
    """Return the bound of a histogram below which a share of the values lies."""
    buckets = re.findall(rf'^{re.escape(name)}_bucket{{.*le="([^"]+)".*}} (\S+)$', page, re.M)
    total = float(buckets[-1][1]) if buckets else 0.0
    return next((float(b) for b, n in buckets if float(n) >= share * total), float("nan"))


class Process:
    """A process that ends with the block it is used in.

    Args:
        command: To start it.
        checkout: Whose package it is to import, in place of this one's.

    Attributes:
        url: Where it can be asked.
    """

    url: str

    def __init__(self, command: Sequence[str], checkout: Path | None = None) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        env = None
        if checkout is not None:
            env = {**os.environ, "PYTHONPATH": str(checkout.resolve() / "src")}
        self.popen = subprocess.Popen(
            command, stdout=self.log, stderr=subprocess.STDOUT, text=True, env=env
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it: politely, then not."""
        if self.popen.poll() is None:
            self.popen.terminate()
            try:
                self.popen.wait(5.0)
            except subprocess.TimeoutExpired:
                self.popen.kill()
                self.popen.wait()

    def output(self) -> str:
        """Return what it has printed."""
        self.log.seek(0)
        return self.log.read()

    def wait_for(self, url: str, timeout_s: float = 180.0) -> None:
        """Wait until it answers."""
        until_s = time.monotonic() + timeout_s
        while True:
            try:
                get(url, 1.0)
                return
            except (OSError, urllib.error.URLError):
                if self.popen.poll() is not None or time.monotonic() > until_s:
                    raise RuntimeError(f"no answer from {url}:\n{self.output()}") from None
                time.sleep(0.05)

    @property
    def cpu_s(self) -> float:
        """CPU time that its threads have used."""
        return self.cpu_s_of(self.popen.pid)

    @staticmethod
    def cpu_s_of(pid: int) -> float:
        """CPU time that the threads of a process have used."""
        used_ns = 0
        for task in Path(f"/proc/{pid}/task").iterdir():
            used_ns += int((task / "schedstat").read_text(encoding="ascii").split()[0])
        return used_ns / 1e9

    @property
    def rss_bytes(self) -> int:
        """Memory it has in use."""
        text = Path(f"/proc/{self.popen.pid}/statm").read_text(encoding="ascii")
        return int(text.split()[1]) * _PAGE_BYTES


class Engines(Process):
    """Emulated replicas of a scenario, all in one process.

    Attributes:
        urls: Of the replicas.
        admin_url: Of their fault switch.
        settings: As given, to start them once more.
    """

    def __init__(
        self,
        scenario: str,
        *,
        replicas: str = "all",
        count: int = 8,
        ports: Sequence[int] = (),
        speed: float = 1.0,
        stream_interval: int = 8,
    ) -> None:
        self.settings = {
            "scenario": scenario,
            "replicas": replicas,
            "count": count,
            "speed": speed,
            "stream_interval": stream_interval,
        }
        base = ports[0] if ports else free_ports(count)[0]
        (admin,) = free_ports(1)
        super().__init__(
            [
                *_SERVEGYM,
                *("serve", "engine"),
                *("--scenario", scenario, "--replica", replicas, "--stamped"),
                *("--port", str(base), "--admin-port", str(admin)),
                *("--speed", str(speed), "--stream-interval", str(stream_interval)),
            ]
        )
        self.urls = [f"http://127.0.0.1:{base + i}" for i in range(count)]
        self.admin_url = f"http://127.0.0.1:{admin}"
        self.wait_for(f"{self.admin_url}/state")

    def state(self) -> list[dict[str, Any]]:
        """Return the state of all replicas."""
        return json.loads(get(f"{self.admin_url}/state"))

    def fault(self, replica: int, kind: str, value: float = 1.0) -> None:
        """Let a fault happen."""
        body = {"replica": replica, "kind": kind, "value": value}
        status, answer = post(f"{self.admin_url}/faults", body)
        if status != 200:
            raise RuntimeError(answer)

    def num_ended(self) -> float:
        """Count the requests that ended or were aborted."""
        return sum(metric(get(f"{u}/metrics"), "vllm:request_success_total") for u in self.urls)


class Router(Process):
    """The router in front of replicas.

    Attributes:
        url: For clients.
        admin_url: For operators.
        again: Starts it once more, at the same ports.
    """

    def __init__(
        self,
        folder: Path,
        replicas: Sequence[Mapping[str, object]],
        *,
        checkout: Path | None = None,
        workers: int | None = None,
        ports: Sequence[int] = (),
        **settings: Any,
    ) -> None:
        port, admin = ports or free_ports(2)
        self.again = partial(
            Router,
            folder,
            replicas,
            checkout=checkout,
            workers=workers,
            ports=(port, admin),
            **settings,
        )
        listen = {"port": port, "admin_port": admin}
        config = {
            "replicas": list(replicas),
            "listen": listen if workers is None else {**listen, "workers": workers},
            **settings,
        }
        path = folder / f"router-{port}.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        super().__init__([*_SERVEGYM, "serve", "router", "--config", str(path)], checkout)
        self.url = f"http://127.0.0.1:{port}"
        self.admin_url = f"http://127.0.0.1:{admin}"
        self.wait_for(f"{self.url}/health")

    def metrics(self) -> str:
        """Return the router's metrics."""
        return get(f"{self.admin_url}/metrics")

    def state(self) -> dict[str, Any]:
        """Return what operators see."""
        return json.loads(get(f"{self.admin_url}/state"))


class Nginx(Process):
    """A bare round-robin proxy in one process, without buffering."""

    def __init__(self, folder: Path, urls: Sequence[str]) -> None:
        program = shutil.which("nginx")
        if program is None:
            raise RuntimeError("nginx is missing: apt-get install nginx-light")
        port = free_ports(1)[0]
        servers = "\n".join(f"server {url.removeprefix('http://')};" for url in urls)
        path = folder / "nginx.conf"
        path.write_text(
            f"""
daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr error;
worker_rlimit_nofile 16384;
events {{ worker_connections 8192; }}
http {{
  access_log off; keepalive_requests 1000000; client_max_body_size 8m;
  client_body_buffer_size 256k; client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u;
  scgi_temp_path {folder}/s;
  upstream engines {{ {servers} keepalive 1024; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=2048;
    location / {{
      proxy_pass http://engines; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_read_timeout 300s;
    }}
  }}
}}
""",
            encoding="utf-8",
        )
        super().__init__([program, "-e", "stderr", "-c", str(path)])
        self.url = f"http://127.0.0.1:{port}"
        self.wait_for(f"{self.url}/health")


class BareRelay(Process):
    """A relay of uvloop and Python that does nothing: see `bare_relay.py`."""

    def __init__(self, urls: Sequence[str]) -> None:
        (port,) = free_ports(1)
        program = Path(__file__).with_name("bare_relay.py")
        super().__init__([sys.executable, str(program), str(port), *urls])
        self.url = f"http://127.0.0.1:{port}"
        self.wait_for(f"{self.url}/v1/models")


def replica_entries(scenario: str, urls: Sequence[str] = ()) -> list[dict[str, object]]:
    """Write a router's entry for every replica of a scenario; without URLs only to count them."""
    from servegym.scenario import load_scenario

    found = load_scenario(scenario)
    episode = found.episode(0, num_requests=1)
    entries: list[dict[str, object]] = []
    for i, t in enumerate(episode.type_idx):
        url = urls[i] if urls else ""
        fleet, kind = found.fleet[int(t)], found.spec.types[int(t)]
        hardware = {
            "gpu": fleet.gpu,
            "model": found.model,
            "tp": fleet.tp,
            "precision": found.precision,
            "speed": float(episode.speed[i]),
            "max_num_seqs": kind.max_num_seqs,
            "max_num_batched_tokens": kind.max_num_batched_tokens,
            "kv_capacity_tokens": kind.num_blocks * found.spec.block_size,
        }
        entries.append({"name": f"replica-{i}", "url": url, "hardware": hardware})
    return entries
