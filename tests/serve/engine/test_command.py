"""`servegym serve engine`."""

from __future__ import annotations

import signal
import subprocess
import sys
import urllib.request

import pytest

from servegym.commands.serve_engine import ServeEngine
from servegym.errors import ConfigError

PROGRAM = "from servegym.commands.serve_engine import ServeEngine; ServeEngine({}).run()"


def test_command_says_where_each_replica_listens_and_ends_when_told():
    program = PROGRAM.format("'homogeneous-light', replica='0,2', port=0, admin_port=0")
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline().split() for _ in range(3)]
        assert [line[:2] for line in lines[:2]] == [["replica", "0"], ["replica", "2"]]
        with urllib.request.urlopen(f"{lines[1][-1]}/health") as response:
            assert response.status == 200
        with urllib.request.urlopen(f"{lines[2][-1]}/state") as response:
            assert response.status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"replica": "first"}, "--replica is an index"),
        ({"replica": "99"}, "the scenario has replicas 0 to"),
        ({"scenario": "mixed-chta"}, "did you mean mixed-chat"),
        ({"faults": ("soon:0:hang",)}, "a fault is SECONDS:REPLICA:KIND"),
        ({"stream_interval": 0}, "stream_interval must be at least 1"),
        ({"port": 70000}, "choose another --host or --port"),
        ({"host": "no.such.host.invalid"}, "choose another --host or --port"),
    ],
)
def test_wrong_setting_is_one_sentence(settings, said):
    with pytest.raises(ConfigError, match=said):
        ServeEngine(**settings).run()
