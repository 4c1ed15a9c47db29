"""Files are there whole or not at all: full disks, read-only places, interruptions."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from servegym import whole_files
from servegym.errors import OutputError
from servegym.whole_files import require_writable, write_whole


def fail_at(monkeypatch, call: str, number: int, error: BaseException) -> None:
    """Let the `number`th call of a function of `os` fail."""
    real, count = getattr(os, call), [0]

    def failing(*arguments):
        count[0] += 1
        if count[0] == number:
            raise error
        return real(*arguments)

    monkeypatch.setattr(whole_files.os, call, failing)


def test_files_are_written_and_replaced_and_folders_made(tmp_path):
    a, b = tmp_path / "new" / "a.txt", tmp_path / "new" / "b.txt"
    write_whole({a: b"1", b: b"2"})
    write_whole({a: b"3"})
    assert (a.read_bytes(), b.read_bytes()) == (b"3", b"2")
    assert sorted(x.name for x in a.parent.iterdir()) == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
@pytest.mark.parametrize("number", [1, 2])
def test_what_was_there_is_untouched_when_one_of_several_cannot_be_written(
    tmp_path, monkeypatch, error, number
):
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    write_whole({a: b"old a", b: b"old b"})
    fail_at(monkeypatch, "fsync", number, error)
    with pytest.raises((OutputError, KeyboardInterrupt)) as raised:
        write_whole({a: b"new a", b: b"new b"})
    assert (a.read_bytes(), b.read_bytes()) == (b"old a", b"old b")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.txt", "b.txt"]
    if isinstance(error, OSError):
        path = (a, b)[number - 1]
        want = (
            f"{path} cannot be written (no space left on device): make room or name another place"
        )
        assert str(raised.value) == want


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_device_is_written_to_and_not_replaced():
    with pytest.raises(OutputError, match="no space left on device"):
        write_whole({Path("/dev/full"): b"x"})
    assert Path("/dev/full").is_char_device()


def test_a_link_stays_one(tmp_path):
    (tmp_path / "real.txt").write_bytes(b"old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    write_whole({tmp_path / "link.txt": b"new"})
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_bytes() == b"new"


@pytest.mark.parametrize("place", ["file/below", "file", "/proc/nothing/here"])
def test_a_place_that_cannot_be_a_folder_is_refused_before_any_work(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        require_writable(tmp_path / place)
    require_writable(tmp_path / "later" / "deep")
    assert [x.name for x in tmp_path.iterdir()] == ["file"]


def test_a_figure_is_written_whole_in_the_format_of_its_ending(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from servegym.drawing import pyplot, save_figure

    path = tmp_path / "chart.svg"
    save_figure(pyplot().figure(), path)
    before = path.read_bytes()
    assert b"<svg" in before
    fail_at(monkeypatch, "fsync", 1, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OutputError, match=r"chart.svg cannot be written \(no space left"):
        save_figure(pyplot().figure(), path)
    assert path.read_bytes() == before
