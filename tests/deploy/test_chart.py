"""The Helm chart: its values, and what it renders them to.

`rendered.yaml` is what Helm gives for `ci/values.yaml`. What it says is looked at here; where Helm
is installed (by the extra `dev` on Linux), it is compared with what the chart gives now.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from servegym import __version__
from servegym.serve.router.config import parse_config

CHART = Path(__file__).parents[2] / "deploy" / "chart"
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
GIVEN = yaml.safe_load((CHART / "ci" / "values.yaml").read_text())


def by_kind(documents):
    """Documents by their kinds, and the service by which routers find each other by `Peers`."""
    found = list(documents)
    kinds = ["Peers" if d["metadata"]["name"].endswith("-peers") else d["kind"] for d in found]
    assert len(set(kinds)) == len(found)
    return dict(zip(kinds, found, strict=True))


RENDERED = by_kind(yaml.safe_load_all((Path(__file__).parent / "rendered.yaml").read_text()))
POD = RENDERED["Deployment"]["spec"]["template"]["spec"]
(ROUTER,) = POD["containers"]
HELM = shutil.which("helm", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
needs_helm = pytest.mark.skipif(HELM is None, reason="helm is not installed")


def helm(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(HELM), *map(str, words)], capture_output=True, text=True, timeout=60, check=False
    )


def test_the_chart_is_of_this_version():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__


def test_the_schema_knows_every_value_and_no_other():
    assert set(SCHEMA["properties"]) - {"global"} == set(DEFAULTS)
    nested = {
        name: set(DEFAULTS[name])
        for name, what in SCHEMA["properties"].items()
        if what.get("additionalProperties") is False
    }
    assert {"image", "service", "metrics", "serviceAccount"} <= set(nested)
    for name, keys in nested.items():
        assert set(SCHEMA["properties"][name]["properties"]) == keys, name


def test_the_router_can_read_the_file_that_it_gets():
    text = RENDERED["ConfigMap"]["data"]["router.yaml"]
    config = parse_config(yaml.safe_load(text), "router.yaml")
    assert [replica.name for replica in config.replicas] == ["h100-0", "other-0"]
    assert (config.listen.host, config.listen.port) == (
        "0.0.0.0",
        ROUTER["ports"][0]["containerPort"],
    )
    assert config.log.format == "json"
    mounts = {mount["name"]: mount["mountPath"] for mount in ROUTER["volumeMounts"]}
    assert ROUTER["args"][-1] == mounts["config"] == "/etc/servegym/router.yaml"
    assert config.auth is not None
    assert str(config.auth.keys_file) == f"{mounts['keys']}/keys.yaml"
    assert config.dispatch.log is not None
    assert str(config.dispatch.log.folder) == mounts["decision-log"]
    # it may take as long to stop as its file says, after the time in which requests still come
    sleep_s = ROUTER["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert POD["terminationGracePeriodSeconds"] > config.drain_s + sleep_s


def test_the_router_may_do_nothing_that_it_need_not():
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert POD["automountServiceAccountToken"] is False
    assert ROUTER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    (keys,) = (volume for volume in POD["volumes"] if volume["name"] == "keys")
    assert keys["secret"]["defaultMode"] == 0o440


def test_all_that_the_router_writes_to_is_a_volume():
    written = {mount["mountPath"] for mount in ROUTER["volumeMounts"] if not mount.get("readOnly")}
    assert written == {"/var/log/servegym", "/tmp"}
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    for mount in ROUTER["volumeMounts"]:
        assert mount["name"] in volumes
        assert mount.get("readOnly") or "emptyDir" in volumes[mount["name"]]


def test_a_fleet_that_is_down_takes_no_requests_and_restarts_no_router():
    assert ROUTER["readinessProbe"]["httpGet"] == {"path": "/health", "port": "http"}
    assert ROUTER["livenessProbe"]["tcpSocket"] == {"port": "http"}


def test_all_that_selects_pods_selects_those_of_the_router():
    labels = RENDERED["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        RENDERED["Deployment"]["spec"]["selector"]["matchLabels"],
        RENDERED["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        RENDERED["Service"]["spec"]["selector"],
        POD["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
    ]
    for selector in selectors:
        assert selector
        assert selector.items() <= labels.items()
    monitor = RENDERED["ServiceMonitor"]["spec"]
    assert (
        monitor["selector"]["matchLabels"].items()
        <= RENDERED["Service"]["metadata"]["labels"].items()
    )
    (port,) = RENDERED["Service"]["spec"]["ports"]
    assert monitor["endpoints"][0]["port"] == port["name"]
    assert port["targetPort"] == ROUTER["ports"][0]["name"]


def test_routers_find_each_other_by_a_name_and_hear_each_other_by_a_secret():
    config = parse_config(yaml.safe_load(RENDERED["ConfigMap"]["data"]["router.yaml"]), "file")
    assert config.peers is not None
    assert config.peers.host == "0.0.0.0"
    peers = RENDERED["Peers"]
    (port,) = peers["spec"]["ports"]
    (open_port,) = (one for one in ROUTER["ports"] if one["name"] == "peers")
    assert open_port["protocol"] == port["protocol"] == "UDP"
    assert open_port["containerPort"] == port["port"] == config.peers.port
    assert config.peers.addresses == (f"{peers['metadata']['name']}:{port['port']}",)
    # all addresses, and of those too that are not ready: who is not ready has requests still
    assert peers["spec"]["clusterIP"] == "None"
    assert peers["spec"]["publishNotReadyAddresses"] is True
    assert peers["spec"]["selector"] == RENDERED["Service"]["spec"]["selector"]
    (secret,) = (one for one in ROUTER["env"] if one["name"] == config.peers.secret_env)
    assert secret["valueFrom"]["secretKeyRef"]["name"] == GIVEN["peersSecret"]


@needs_helm
def test_without_their_secret_routers_do_not_know_of_each_other(tmp_path):
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(GIVEN | {"peersSecret": "", "env": [{"name": "A"}]}))
    said = helm("template", "prod", CHART, "-n", "llm", "--values", path)
    assert said.returncode == 0, said.stderr
    kinds = by_kind(
        document
        for document in yaml.safe_load_all(said.stdout)
        if document
        and document["kind"] in ("ConfigMap", "Deployment", "Service")
        and not document["metadata"]["name"].endswith("-dashboard")
    )
    assert set(kinds) == {"ConfigMap", "Deployment", "Service"}
    (container,) = kinds["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert container["env"] == [{"name": "A"}]
    file = yaml.safe_load(kinds["ConfigMap"]["data"]["router.yaml"])
    assert parse_config(file, "file").peers is None


@needs_helm
def test_helm_renders_what_is_recorded_and_the_files_as_they_are():
    said = helm("template", "prod", CHART, "-n", "llm", "--values", CHART / "ci" / "values.yaml")
    assert said.returncode == 0, said.stderr
    found = [document for document in yaml.safe_load_all(said.stdout) if document]
    rules = [document for document in found if document["kind"] == "PrometheusRule"]
    assert rules[0]["spec"] == yaml.safe_load((CHART / "files" / "rules.yaml").read_text())
    boards = [d for d in found if d["metadata"]["name"].endswith("-dashboard")]
    shown = boards[0]["data"]["servegym-router.json"]
    assert json.loads(shown) == json.loads((CHART / "files" / "dashboard.json").read_text())
    rest = [document for document in found if document not in rules + boards]
    assert by_kind(rest) == RENDERED
    assert helm("lint", CHART).returncode == 0


@needs_helm
@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "config.replicas is empty: name at least one engine"),
        ({"replicaCount": 0}, "replicaCount"),
        ({"config": {"replicas": [{"name": "a", "url": "a:8000"}]}}, "url"),
        ({"sorce": {}}, "sorce"),
        ({"metrics": {"polcy": {}}}, "polcy"),
    ],
)
def test_helm_refuses_wrong_values(tmp_path, values, sentence):
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(values))
    said = helm("template", "prod", CHART, "--values", path)
    assert said.returncode != 0
    assert sentence in said.stderr
