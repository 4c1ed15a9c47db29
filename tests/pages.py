"""Pages of the documentation, run as their readers run them.

A fence of a page means, by what stands behind its backquotes:

- `python title="x.py"`, `yaml title="x.yaml"` and so on: a file, written into the folder;
- `python`: a program; those of one page share their names;
- `sh`: commands, run by a shell that stops at the first failure;
- `sh title="..."`: a server in a terminal of its own, which ends with the page;
- `text`, right behind one of the last three: what is printed; `...` stands for anything.

Other fences are only read.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
_FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fence of a page."""

    language: str
    title: str
    text: str
    output: str | None


def blocks(page: Path, changes: Mapping[str, str]) -> list[Block]:
    """Read the fences of a page, with some words replaced."""
    text = page.read_text(encoding="utf-8")
    for old, new in changes.items():
        text = re.sub(rf"\b{old}\b", new, text)
    found = list(_FENCE.finditer(text))
    made = []
    for i, fence in enumerate(found):
        behind = found[i + 1] if i + 1 < len(found) else None
        printed = behind[3] if behind and behind[1] == "text" else None
        made.append(Block(fence[1], fence[2] or "", fence[3], printed))
    return made


def free_ports(count: int) -> list[int]:
    """Find so many free ports in a row."""
    while True:
        with contextlib.ExitStack() as held:
            first = held.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            ports = [first.getsockname()[1] + i for i in range(count)]
            try:
                for port in ports[1:]:
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except (OSError, OverflowError):
                continue
            return ports


def programs(folder: Path) -> dict[str, str]:
    """Make `servegym` and `python` in a folder, and the environment in which they are found."""
    code = "from servegym.cli import main; main()"
    folder.mkdir()
    for name, words in (("python", ""), ("servegym", f" -c '{code}'")):
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}"{words} "$@"\n')
        path.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "130",
    }


def require_output(printed: str, wanted: str | None, where: str) -> None:
    """Fail if something was printed that the page does not say; blanks do not count."""
    if wanted is None:
        return
    parts = [re.escape(" ".join(part.split())) for part in wanted.split("...")]
    if not re.fullmatch(".*".join(parts), " ".join(printed.split()), re.DOTALL):
        raise AssertionError(f"{where} printed\n{printed}\nbut its page says\n{wanted}")


@contextlib.contextmanager
def served(command: str, environment: dict[str, str], log: Path) -> Iterator[None]:
    """Run a server until the end of the block, then end it as Ctrl-C does."""
    with log.open("w") as file:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            start_new_session=True,
        )
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def await_output(log: Path, wanted: str | None, where: str, timeout_s: float = 300.0) -> None:
    """Wait until a server has printed what its page says."""
    deadline = time.monotonic() + timeout_s
    while wanted is not None:
        try:
            return require_output(log.read_text(), wanted, where)
        except AssertionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def follow(
    pages: Sequence[Path], folder: Path, changes: Mapping[str, str] | None = None
) -> dict[str, int]:
    """Do what pages say, one after the other, in one folder.

    Args:
        pages: Files of the documentation.
        folder: Where their reader works; must be the current folder.
        changes: Words of the pages that are replaced, such as port numbers.

    Returns:
        How many fences of each kind were acted on.
    """
    environment = programs(folder / "bin")
    done = dict.fromkeys(("file", "program", "command", "server"), 0)
    with contextlib.ExitStack() as servers:
        for page in pages:
            names: dict[str, object] = {"__name__": "page"}
            for number, block in enumerate(blocks(page, changes or {}), 1):
                where = f"fence {number} of {page.relative_to(ROOT)}"
                if block.language == "sh" and block.title:
                    log = folder / f"{page.stem}-{number}.log"
                    servers.enter_context(served(block.text.strip(), environment, log))
                    await_output(log, block.output, where)
                    done["server"] += 1
                elif block.language == "sh":
                    ran = subprocess.run(
                        ["bash", "-euo", "pipefail", "-c", block.text],
                        env=environment,
                        cwd=folder,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                        text=True,
                    )
                    assert ran.returncode == 0, f"{where} failed:\n{ran.stdout}"
                    require_output(ran.stdout, block.output, where)
                    done["command"] += 1
                elif block.title:
                    (folder / block.title).write_text(block.text)
                    done["file"] += 1
                elif block.language == "python":
                    printed = io.StringIO()
                    with contextlib.redirect_stdout(printed):
                        exec(compile(block.text, where, "exec"), names)
                    require_output(printed.getvalue(), block.output, where)
                    done["program"] += 1
    return done
