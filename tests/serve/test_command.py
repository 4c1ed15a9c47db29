"""`servegym serve router` from the command line, and the page that explains it."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from servegym.cli import main
from servegym.commands import serve
from servegym.serve.guards import Reason
from servegym.serve.router.config import parse_config

PAGE = Path(__file__).parents[2] / "docs" / "live.md"
RATES = "{prefill_tokens_per_s: 1000, decode_step_s: 0.01}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write(folder: Path, policy: str = "added-delay", port: int = 0) -> Path:
    path = folder / "router.yaml"
    path.write_text(
        f"replicas: [{{name: a, url: 'http://127.0.0.1:{free_port()}', rates: {RATES}}}]\n"
        f"listen: {{port: {port}, admin_port: 0}}\n"
        f"dispatch: {{runtime: {{policy: {policy}}}, log: {{folder: {folder / 'log'}}}}}\n"
        "drain_s: 1\n"
    )
    return path


def test_check_says_that_a_file_is_good(tmp_path, capsys):
    main(["serve", "router", "--config", str(write(tmp_path)), "--check", "--offline"])
    assert "router.yaml is good" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        ("added-dely", "did you mean added-delay"),
        ("none/policy.onnx", "must exist with a manifest.json beside it"),
        ("what-if", "cannot be live"),
    ],
)
def test_check_says_what_is_wrong_in_one_sentence(tmp_path, capsys, policy, sentence):
    with pytest.raises(SystemExit) as end:
        main(["serve", "router", "--config", str(write(tmp_path, policy)), "--check"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


def answer(url: str) -> int:
    """Status of a server that is about to start."""
    for _ in range(600):
        try:
            with urllib.request.urlopen(url, timeout=1) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(url)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aiohttp", "httptools", "prometheus-client"])
def test_what_is_not_installed_is_named(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(
        serve, "find_spec", lambda asked: None if asked == name.replace("-", "_") else object()
    )
    with pytest.raises(SystemExit) as end:
        main(["serve", "router", "--config", str(write(tmp_path)), "--check"])
    assert end.value.code == 2
    assert f"serving needs {name}: pip install {name}" in " ".join(capsys.readouterr().err.split())


def test_a_router_serves_until_it_is_told_to_stop(tmp_path):
    port = free_port()
    code = "from servegym.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "router", "--config"]
    process = subprocess.Popen([*command, str(write(tmp_path, port=port))])
    try:
        assert answer(f"http://127.0.0.1:{port}/health") == 503  # its only replica is not there
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


def test_the_file_on_the_page_is_a_good_one():
    block = re.search(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    config = parse_config(yaml.safe_load(block[1]), "page")
    assert [replica.name for replica in config.replicas] == ["h100-0", "other-0"]
    assert config.dispatch.runtime.mode == "shadow"


def test_the_program_on_the_page_runs():
    block = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(block[1], "live.md", "exec"), names)
    assert names["replica"] == 0
    assert names["dispatcher"].state.outstanding(0) == 0
    lines = [line for line in block[1].splitlines() if line and not line.startswith("from")]
    assert len(lines) <= 20


def test_every_reason_is_on_the_page():
    text = PAGE.read_text()
    assert [reason for reason in Reason if f"`{reason.value}`" not in text] == []
