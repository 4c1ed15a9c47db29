"""Ask a router that runs from the image's file system, for `scripts/test-image`.

Arguments: the file system, and a folder with `run`, which starts it, and `etc` for its file.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml

#: From its start to its first good answer to a health check, on a busy machine.
_MAX_START_S = 60.0
_METRICS = "vllm:num_requests_running 0\nvllm:num_requests_waiting 0\nvllm:kv_cache_usage_perc 0\n"


class Engine(BaseHTTPRequestHandler):
    """What the router sends requests to."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Answer health checks, and questions for models and metrics."""
        models = json.dumps({"object": "list", "data": [{"id": "m", "object": "model"}]})
        self._answer(models if self.path == "/v1/models" else _METRICS)

    def do_POST(self) -> None:
        """Complete a prompt."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(json.dumps({"choices": [{"text": "x", "finish_reason": "stop"}]}))

    def _answer(self, text: str) -> None:
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def ask(url: str, body: dict[str, object] | None = None) -> str:
    """Return what a server says."""
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data), timeout=10) as response:
        text: str = response.read().decode()
    return text


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def main(root: Path, folder: Path) -> None:
    """Start, ask, stop; raise if anything is not as it should be."""
    engine = ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    threading.Thread(target=engine.serve_forever, daemon=True).start()
    port = free_port()
    rates = {"prefill_tokens_per_s": 10_000, "decode_step_s": 0.01}
    url = f"http://127.0.0.1:{engine.server_port}"
    config = {
        "replicas": [{"name": "engine", "url": url, "rates": rates}],
        "listen": {"port": port, "admin_port": free_port()},
        "dispatch": {"runtime": {"policy": "generalist"}},
        "log": {"format": "json"},
        "drain_s": 1,
    }
    (folder / "etc" / "router.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    begin_s = time.monotonic()
    command = ["unshare", "--mount", "sh", *map(str, (folder / "run", root, folder / "etc"))]
    router = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = ""
    try:
        while True:
            try:
                ask(f"http://127.0.0.1:{port}/health")
                break
            except (urllib.error.URLError, ConnectionError):
                if router.poll() is not None or time.monotonic() - begin_s > _MAX_START_S:
                    raise
                time.sleep(0.05)
        start_s = time.monotonic() - begin_s
        answer = ask(f"http://127.0.0.1:{port}/v1/completions", {"model": "m", "prompt": "Why?"})
        assert json.loads(answer)["choices"][0]["text"] == "x", answer
        page = ask(f"http://127.0.0.1:{port}/metrics")
        assert 'servegym_decisions_total{by="policy"}' in page, page
        status = Path(f"/proc/{router.pid}/status").read_text(encoding="utf-8")
        (user,) = (line for line in status.splitlines() if line.startswith("Uid:"))
        assert user.split()[1] == "65532", user
        (memory,) = (x for x in page.splitlines() if x.startswith("process_resident_memory_bytes"))
        router.send_signal(signal.SIGTERM)
        said, _ = router.communicate(timeout=20)
        assert router.returncode == 0, router.returncode
        assert "compiling" not in said, "kernels are missing: they were compiled at the start"
    finally:
        router.kill()
        said = said or router.communicate()[0]
        print(said, end="")
    size = subprocess.run(["du", "-sm", root], capture_output=True, text=True, check=True).stdout
    print(f"{size.split()[0]} MB; serves {start_s:.1f} s after its start; ", end="")
    print(f"{float(memory.split()[1]) / 1e6:.0f} MB of memory")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
