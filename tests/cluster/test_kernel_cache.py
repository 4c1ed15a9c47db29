"""Where compiled kernels are kept: nothing may fail because a disk is read-only, full or torn."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import numba
import pytest

from servegym.cluster import kernel_cache
from servegym.cluster.jit import NOTICE, kernel
from servegym.cluster.kernel_cache import places, private_folder

MODULE = """
import sys
from servegym.cluster import jit
jit.NOTICE._patience_s = 0.0

@jit.kernel
def twice(x: int) -> int:
    return 2 * x

assert twice(21) == 42
print("compiled" if twice.stats.cache_misses else "loaded")
"""


@pytest.fixture
def only(monkeypatch):
    """Let only some folders be writable."""

    def patch(*writable: Path, cache_dir: str = "") -> None:
        monkeypatch.setattr(numba.config, "CACHE_DIR", cache_dir)
        monkeypatch.setattr(kernel_cache, "_user_folder", lambda: "/users/cache")
        monkeypatch.setattr(
            kernel_cache,
            "is_writable",
            lambda folder: any(folder.is_relative_to(w) for w in writable),
        )

    return patch


def test_kernels_are_kept_where_numba_keeps_them_if_that_can_be_written(only):
    source = Path("/package/module.py")
    only(Path("/"))
    assert places(source) == ([Path("/package/__pycache__")], Path("/package/__pycache__"))
    only(Path("/"), cache_dir="/mine")
    readable, target = places(source)
    assert readable == [target]
    assert target is not None
    assert target.parent == Path("/mine")


def test_what_is_read_only_is_read_and_the_next_place_written(only, tmp_path, monkeypatch):
    source = Path("/package/module.py")
    only(Path("/users"))
    readable, target = places(source)
    assert readable == [Path("/package/__pycache__"), target]
    assert target is not None
    assert target.parent == Path("/users/cache")
    monkeypatch.setattr(kernel_cache.tempfile, "gettempdir", lambda: str(tmp_path))
    only(tmp_path, cache_dir="/image/cache")
    readable, target = places(source)
    assert len(readable) == 4
    assert readable[0].parent == Path("/image/cache")
    assert target is not None
    assert target.is_relative_to(tmp_path)
    only()
    readable, target = places(source)
    assert len(readable) == 2
    assert target is None


def test_every_kernel_is_compiled_by_the_one_module_that_knows_where_to_keep_it():
    root = Path(kernel_cache.__file__).parents[1]
    sources = [path for path in root.rglob("*.py") if path.name != "jit.py"]
    for name in ("agents", "baselines", "envs", "train"):  # rglob does not follow links
        sources += (root / name).resolve().rglob("*.py")
    assert len(sources) > 200
    strays = [path for path in sources if re.search(r"\b(njit|jit)\(|@njit\b", path.read_text())]
    assert strays == []


def test_temporary_folder_that_others_can_write_is_not_used(tmp_path):
    folder = private_folder(lambda: str(tmp_path))
    assert folder is not None
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert private_folder(lambda: str(tmp_path)) is None
    folder.rmdir()
    folder.symlink_to(tmp_path)
    assert private_folder(lambda: str(tmp_path)) is None
    assert private_folder(lambda: "/proc/nowhere") is None


def test_full_disk_keeps_nothing_and_says_so_once(monkeypatch):
    said = []
    monkeypatch.setattr(NOTICE, "_say", said.append)
    monkeypatch.setattr(NOTICE, "_trouble", set())

    def full(self, key, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(kernel_cache.IndexDataCacheFile, "save", full)
    monkeypatch.setattr(kernel_cache.IndexDataCacheFile, "load", lambda self, key: None)

    @kernel
    def add(x: int, y: int) -> int:
        return x + y

    @kernel
    def subtract(x: int, y: int) -> int:
        return x - y

    assert (add(2, 3), subtract(2, 3)) == (5, -1)
    (line,) = [x for x in said if "kept" in x]
    assert "No space left on device" in line
    assert "NUMBA_CACHE_DIR" in line


def test_torn_cache_is_compiled_anew(tmp_path):
    assert run_module(tmp_path) == "compiled"
    for suffix in (".nbc", ".nbi"):
        for file in tmp_path.rglob(f"*{suffix}"):
            file.write_bytes(file.read_bytes()[:40])
        assert run_module(tmp_path) == "compiled"
    assert run_module(tmp_path) == "loaded"


def write_module(folder: Path) -> Path:
    path = folder / "small.py"
    path.write_text(MODULE)
    return path


def run_module(folder: Path) -> str:
    script = write_module(folder)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True, env=environment()
    )
    return done.stdout.strip()


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("NUMBA_CACHE_DIR", "TMPDIR")}
    return {**kept, **more}


@pytest.fixture(scope="module")
def read_only():
    """Return a runner of a script in a file system that is read-only but for /dev/shm."""
    remount = "mount --make-rprivate / && mount -o remount,ro,bind / && "
    remount += "mount -t tmpfs tmpfs /dev/shm && "
    try:
        probe = ["unshare", "-m", "sh", "-c", remount + "! touch /zz 2>/dev/null"]
        able = subprocess.run(probe, capture_output=True, check=False).returncode == 0
    except OSError:
        able = False
    if not able:
        pytest.skip("file systems cannot be mounted here")

    def run(folder: Path, starts: int = 1, **more: str) -> tuple[str, str]:
        python = " && ".join(["$PYTHON small.py"] * starts)
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", f"{remount} cd {folder} && {python}"],
            capture_output=True,
            text=True,
            check=True,
            env=environment(
                PYTHON=sys.executable, SERVEGYM_COMPILE_NOTICE="1", HOME="/nowhere", **more
            ),
        )
        return done.stdout, done.stderr

    return run


def test_start_where_nothing_can_be_written(read_only, tmp_path):
    write_module(tmp_path)
    said, told = read_only(tmp_path)
    assert said == "compiled\n"
    lines = told.splitlines()
    assert sum("cannot be kept" in line for line in lines) == 1
    assert "Traceback" not in told


def test_temporary_folder_keeps_kernels_for_the_next_start(read_only, tmp_path):
    write_module(tmp_path)
    said, told = read_only(tmp_path, starts=2, TMPDIR="/dev/shm")
    assert said == "compiled\nloaded\n"
    assert "cannot be kept" not in told


def test_kernels_of_the_image_are_loaded(read_only, tmp_path):
    assert run_module(tmp_path) == "compiled"
    assert read_only(tmp_path) == ("loaded\n", "")


def test_filled_cache_directory_that_is_read_only_is_used(read_only, tmp_path):
    (tmp_path / "cache").mkdir()
    where = str(tmp_path / "cache")
    script = write_module(tmp_path)
    subprocess.run(
        [sys.executable, str(script)],
        check=True,
        capture_output=True,
        env=environment(NUMBA_CACHE_DIR=where),
    )
    assert list(Path(where).rglob("*.nbc"))
    assert read_only(tmp_path, NUMBA_CACHE_DIR=where) == ("loaded\n", "")
