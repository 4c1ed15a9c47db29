"""A first use says that it compiles, and that it is done; later ones say nothing."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from numba.core.event import Event, EventStatus

from servegym.cluster.compile_notice import CompileNotice

OURS, OTHERS = object(), object()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def notice(said) -> CompileNotice:
    # nothing here waits for the long limits: they only must not be reached
    return CompileNotice(lambda x: x is OURS, said.append, patience_s=0.0, quiet_s=60.0)


def begin(notice: CompileNotice, dispatcher: object = OURS) -> None:
    notice.notify(Event("numba:compile", EventStatus.START, {"dispatcher": dispatcher}))


def end(notice: CompileNotice, dispatcher: object = OURS) -> None:
    notice.notify(Event("numba:compile", EventStatus.END, {"dispatcher": dispatcher}))


def wait_for(said: list[str], lines: int) -> None:
    for _ in range(1000):
        if len(said) >= lines:
            return
        time.sleep(0.01)
    raise AssertionError(said)


def test_two_lines_tell_of_many_kernels(notice, said):
    begin(notice)
    begin(notice)  # one that the first calls
    wait_for(said, 1)
    end(notice)
    end(notice)
    begin(notice)
    end(notice)
    assert len(said) == 1
    notice.finish()
    assert "compiling" in said[0]
    assert "minutes" in said[0]
    assert said[1].startswith("servegym: compiled 3 kernels in ")
    notice.finish()
    assert len(said) == 2


def test_the_end_is_told_when_nothing_more_is_compiled(said):
    notice = CompileNotice(lambda x: x is OURS, said.append, patience_s=0.0, quiet_s=0.0)
    begin(notice)
    wait_for(said, 1)
    end(notice)
    wait_for(said, 2)


def test_short_compiling_and_that_of_others_is_not_worth_a_line(said):
    notice = CompileNotice(lambda x: x is OURS, said.append, patience_s=60.0, quiet_s=60.0)
    begin(notice)
    end(notice)
    begin(notice, OTHERS)
    end(notice, OTHERS)
    notice.finish()
    assert said == []


def test_a_reason_for_keeping_nothing_is_told_once(notice, said):
    for why in ("full", "full", "read-only"):
        notice.not_kept(why)
    assert len(said) == 2
    assert "(full)" in said[0]


PROGRAM = """
import logging, sys
from servegym.cluster import jit
jit.NOTICE._patience_s = 0.0

@jit.kernel
def added(x: float) -> float:
    total = 0.0
    for i in range(100):
        total += x * i
    return total

added(1.0)
"""


@pytest.mark.parametrize(
    ("switch", "first", "lines"),
    [("1", "", 2), ("0", "", 0), ("1", "logging.getLogger('servegym.compile').disabled = True", 0)],
    ids=["by default", "switched off", "by logging"],
)
def test_a_process_tells_on_standard_error_and_can_be_silenced(
    tmp_path, monkeypatch, switch, first, lines
):
    monkeypatch.setenv("SERVEGYM_COMPILE_NOTICE", switch)
    (tmp_path / "small.py").write_text(
        PROGRAM.replace("import logging, sys", f"import logging\n{first}")
    )
    told = [
        subprocess.run(
            [sys.executable, str(tmp_path / "small.py")], capture_output=True, text=True, check=True
        )
        for _ in range(2)
    ]
    assert told[0].stdout == told[1].stdout == ""
    assert len(told[0].stderr.splitlines()) == lines
    assert told[1].stderr == ""  # loaded from disk
