"""`servegym serve picker` from the command line, and the page that explains it."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from servegym.cli import main
from servegym.commands import serve_picker
from servegym.export import llm_d_file
from servegym.serve.picker.config import PickerConfig

PAGE = Path(__file__).parents[3] / "docs" / "picker.md"
RATES = "{prefill_tokens_per_s: 1000, decode_step_s: 0.01}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write(folder: Path, policy: str = "added-delay", port: int = 0, more: str = "") -> Path:
    path = folder / "picker.yaml"
    path.write_text(
        f"replicas: [{{name: a, url: 'http://127.0.0.1:{free_port()}', rates: {RATES}}}]\n"
        f"listen: {{port: {port}, admin_port: 0}}\n"
        f"dispatch: {{runtime: {{policy: {policy}}}}}\n"
        f"drain_s: 1\n{more}"
    )
    return path


def refused(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["serve", "picker", "--config", *words])
    assert end.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_check_says_that_a_file_is_good(tmp_path, capsys):
    main(["serve", "picker", "--config", str(write(tmp_path)), "--check", "--offline"])
    assert "picker.yaml is good" in capsys.readouterr().out


def test_check_names_a_replica_that_is_not_there(tmp_path, capsys):
    path = write(tmp_path)
    with pytest.raises(SystemExit):
        main(["serve", "picker", "--config", str(path), "--check"])
    said = capsys.readouterr()
    assert re.search(r"a: http://127.0.0.1:\d+/health cannot be reached", said.out)
    assert "names what is not as it should be (1, see above)" in " ".join(said.err.split())


@pytest.mark.parametrize(
    ("policy", "more", "sentence"),
    [
        ("added-dely", "", "did you mean added-delay"),
        ("what-if", "", "cannot be live"),
        ("mct", "response: headers", "mct goes by generated_tokens"),
        ("/no/epp.yaml", "", "no scheduling file at /no/epp.yaml"),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path, capsys, policy, more, sentence):
    said = refused(capsys, str(write(tmp_path, policy, more=more)))
    assert said.startswith("servegym: ")
    assert sentence in said


@pytest.mark.parametrize(
    ("module", "package"), [("grpc", "grpcio"), ("grpc_health", "grpcio-health-checking")]
)
def test_what_is_not_installed_is_named(tmp_path, capsys, monkeypatch, module, package):
    there = serve_picker.find_spec
    monkeypatch.setattr(
        serve_picker, "find_spec", lambda asked: None if asked == module else there(asked)
    )
    assert f"an endpoint picker needs {package}" in refused(capsys, str(write(tmp_path)))


@pytest.mark.slow
def test_a_picker_serves_until_it_is_told_to_stop(tmp_path):
    port = free_port()
    code = "from servegym.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "picker", "--config"]
    process = subprocess.Popen([*command, str(write(tmp_path, port=port))])
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            grpc.channel_ready_future(channel).result(60)
            asked = health_pb2.HealthCheckRequest(service="readiness")
            answer = health_pb2_grpc.HealthStub(channel).Check(asked)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        begin_s = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert time.monotonic() - begin_s < 20
    finally:
        process.kill()
        process.wait()


def test_the_file_on_the_page_is_a_good_one():
    block = re.search(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    config = PickerConfig.model_validate(yaml.safe_load(block[1]))
    assert [replica.name for replica in config.replicas] == ["h100-0", "other-0"]
    assert (config.response, config.fallbacks) == ("bodies", 1)


def test_every_plugin_that_is_known_is_on_the_page():
    text = PAGE.read_text()
    known = llm_d_file._KNOWN
    assert len(known) > 10
    assert [name for name in known if f"`{name}`" not in text] == []
