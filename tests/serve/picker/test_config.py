"""The picker's file: what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from servegym.errors import ConfigError
from servegym.serve.picker.config import PickerConfig, endpoint_of, read_picker_config

EXAMPLES = Path(__file__).parents[3] / "examples"
REPLICA = {
    "name": "r0",
    "url": "http://10.0.0.1:8000",
    "rates": {"prefill_tokens_per_s": 1000.0, "decode_step_s": 0.01},
}


def config(tmp_path, *replicas, **settings) -> PickerConfig:
    path = tmp_path / "picker.yaml"
    path.write_text(yaml.safe_dump({"replicas": [*replicas] or [REPLICA], **settings}))
    return read_picker_config(path)


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("http://10.0.0.1:8000", "10.0.0.1:8000"),
        ("http://10.0.0.1", "10.0.0.1:80"),
        ("http://[2600:4040:5204::1574:24ae]:80/", "[2600:4040:5204::1574:24ae]:80"),
        ("http://[::1]:8000", "[::1]:8000"),
    ],
)
def test_an_endpoint_is_written_as_gateways_write_it(tmp_path, url, endpoint):
    (replica,) = config(tmp_path, {**REPLICA, "url": url}).replicas
    assert endpoint_of(replica.name, replica.url) == endpoint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"url": "http://engine.svc:8000"}, "must have an IP address in its url.*engine.svc"),
        ({"url": "https://10.0.0.1:8000"}, "must be like http://10.0.0.1:8000.*https"),
        ({"url": "http://10.0.0.1:8000/model"}, "must be like http://10.0.0.1:8000.*model"),
        ({"rates": None}, "needs either hardware or rates"),
    ],
)
def test_a_replica_that_no_gateway_can_reach_is_refused(tmp_path, change, words):
    with pytest.raises(ConfigError, match=f"picker.yaml.*{words}"):
        config(tmp_path, {**REPLICA, **change})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"response": "body"}, r"response.*'bodies', 'headers' or 'none'.*'body'"),
        ({"responses": "none"}, "unknown key responses; did you mean response"),
        ({"fallbacks": -1}, "fallbacks.*greater than or equal to 0"),
        ({"listen": {"certificate": "a.pem"}}, "certificate and key go together"),
        ({"response": "none", "dispatch": {"log": {"folder": "x"}}}, "dispatch.log needs response"),
        ({"request": {"max_hold": 1}}, "unknown key request.max_hold; did you mean max_hold_s"),
    ],
)
def test_a_wrong_key_or_value_is_one_clear_sentence(tmp_path, settings, words):
    with pytest.raises(ConfigError, match=words):
        config(tmp_path, **settings)


def test_replicas_must_differ(tmp_path):
    with pytest.raises(ConfigError, match="replica names must differ, got r0 twice"):
        config(tmp_path, REPLICA, {**REPLICA, "url": "http://10.0.0.2:8000"})
    with pytest.raises(ConfigError, match="replicas r0 and r1 have the same endpoint"):
        config(tmp_path, REPLICA, {**REPLICA, "name": "r1", "url": "http://10.0.0.1:8000/"})


def test_the_example_names_the_fleet_that_the_example_of_envoy_has():
    picker = read_picker_config(EXAMPLES / "picker.yaml")
    resources = yaml.safe_load((EXAMPLES / "envoy.yaml").read_text())["static_resources"]
    engines, itself = (
        [
            "{address}:{port_value}".format(**entry["endpoint"]["address"]["socket_address"])
            for entry in cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
        ]
        for cluster in resources["clusters"]
    )
    assert engines == [endpoint_of(replica.name, replica.url) for replica in picker.replicas]
    assert itself == [f"127.0.0.1:{picker.listen.port}"]
