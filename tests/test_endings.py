"""How the program ends when its reader goes, the disk is full or Ctrl-C is pressed."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from servegym import whole_files
from servegym.cli import COMMANDS, main
from servegym.commands.policies import Policies

SCENARIO = {
    "name": "tiny",
    "engine": {"block_size": 16, "max_num_seqs": 16},
    "fleet": [{"gpu": "H100-SXM-80GB"}, {"gpu": "L40S", "count": 2}],
    "workload": {
        "kind": "generated",
        "rate_rps": 30.0,
        "prompt": {"medians_tokens": [200.0], "max_tokens": 1000},
        "output": {"medians_tokens": [30.0], "max_tokens": 100},
    },
    "num_requests": 60,
}
TRAIN = ["train", "--scenario", "tiny.yaml", "--num-envs", "4", "--out", "run"]
PROGRAM = [sys.executable, "-c", "from servegym.cli import main; main()"]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(SCENARIO))
    return tmp_path


@pytest.fixture
def ctrl_c():
    """Ctrl-C ends Python, and programs that it starts, also where the shell had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def unread() -> io.TextIOWrapper:
    """Return a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    return io.TextIOWrapper(io.FileIO(write, "w"), write_through=True)


@pytest.mark.parametrize(
    "words",
    [["--help"], *([name, "--help"] for name in COMMANDS), ["policies"], ["scenarios"], ["costs"]],
    ids=" ".join,
)
def test_a_reader_that_has_gone_ends_any_command_silently(capsys, monkeypatch, words):
    with unread() as stream:
        monkeypatch.setattr(sys, "stdout", stream)  # pytest sets its own before each test
        with pytest.raises(SystemExit) as end:
            main(words)
    assert end.value.code == 141
    assert capsys.readouterr().err == ""


def test_a_reader_that_has_gone_leaves_no_word_at_the_end_of_the_process():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*PROGRAM, "policies"], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyboardInterrupt(), "servegym: interrupted\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out.json"),
            "servegym: out.json: no space left on device\n",
        ),
        (OSError(errno.EROFS, "Read-only file system"), "servegym: read-only file system\n"),
    ],
)
def test_whatever_the_system_refuses_is_one_line(monkeypatch, capsys, error, said):
    def run(self):
        raise error

    monkeypatch.setattr(Policies, "run", run)
    with pytest.raises(SystemExit) as end:
        main(["policies"])
    assert end.value.code == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert capsys.readouterr().err == said


def test_interrupted_training_says_that_nothing_is_saved_yet(place, capsys, monkeypatch):
    ppo = pytest.importorskip("servegym.train.ppo")

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(ppo.Trainer, "_rollout", interrupted)
    with pytest.raises(SystemExit) as end:
        main([*TRAIN, "--decisions", "2048"])
    assert end.value.code == 130
    assert capsys.readouterr().err == "servegym: interrupted; nothing was saved yet\n"


def test_ctrl_c_that_python_drops_stops_training_at_the_next_update(
    place, ctrl_c, capsys, monkeypatch
):
    ppo = pytest.importorskip("servegym.train.ppo")
    rollout, rollouts, dropped = ppo.Trainer._rollout, [], []

    class Dying:
        def __del__(self):  # Python drops what is raised here
            signal.raise_signal(signal.SIGINT)

    def rolled_out(self, *values):
        rollouts.append(Dying())
        rollouts[-1] = None
        return rollout(self, *values)

    monkeypatch.setattr(sys, "unraisablehook", lambda what: dropped.append(what.exc_type))
    monkeypatch.setattr(ppo.Trainer, "_rollout", rolled_out)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as end:
        main([*TRAIN, "--decisions", str(40 * 1024)])
    assert (end.value.code, dropped, len(rollouts)) == (130, [KeyboardInterrupt], 1)
    assert capsys.readouterr().err == "servegym: interrupted; nothing was saved yet\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_full_disk_ends_training_in_one_line_and_what_was_saved_stays(place, capsys, monkeypatch):
    pytest.importorskip("torch")
    real, count = os.fsync, [0]

    def fsync(handle):
        count[0] += 1
        if count[0] > 4:  # config.json, checkpoint.pt and their folder were written
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(whole_files.os, "fsync", fsync)
    with pytest.raises(SystemExit) as end:
        main([*TRAIN, "--decisions", "1024"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said == (
        "servegym: run/policy/policy.onnx cannot be written (no space left on device): make room"
        " or name another place\n"
    )
    assert not list((place / "run" / "policy").iterdir())
    monkeypatch.undo()
    os.chdir(place)
    main([*TRAIN, "--decisions", "1024"])  # what was trained is still there
    assert "finished with this configuration: run, after 1 updates" in capsys.readouterr().out
    assert sorted(x.name for x in (place / "run").iterdir()) == [
        "checkpoint.pt",
        "config.json",
        "policy",
        "tensorboard",
    ]
    with pytest.raises(SystemExit) as end:
        main([*TRAIN, "--decisions", "2048", "--load", "0.5", "0.9"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "total_decisions is 1024 there, 2048 here; load is [0.6, 1.1] there, [0.5, 0.9]" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("out", ["tiny.yaml", "tiny.yaml/below", "/proc/nowhere/run"])
def test_output_folder_that_cannot_be_written_is_refused_first(place, capsys, monkeypatch, out):
    network_run = pytest.importorskip("servegym.train.network_run")
    monkeypatch.setattr(network_run, "Validation", None)  # nothing is played before
    with pytest.raises(SystemExit) as end:
        main([*TRAIN[:-1], out, "--decisions", "1024"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"servegym: {out} cannot be written (")
    assert said.count("\n") == 1


@pytest.mark.slow
def test_ctrl_c_keeps_the_checkpoint_and_the_same_command_goes_on(place, ctrl_c):
    pytest.importorskip("torch")
    words = [*PROGRAM, *TRAIN, "--decisions", str(12 * 1024)]
    environment = dict(os.environ, SERVEGYM_COMPILE_NOTICE="0")
    running = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    while not (place / "run" / "checkpoint.pt").exists():
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate()
    assert running.returncode == 130, said
    assert said.startswith("servegym: interrupted; run holds ")
    assert said.endswith(" updates, and the same command goes on from there\n")
    assert said.count("\n") == 1
    assert not list((place / "run").glob(".*"))
    again = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    assert "training in run, after " in again.stdout
    assert (place / "run" / "policy" / "manifest.json").is_file()
