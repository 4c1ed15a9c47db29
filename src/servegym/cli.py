"""The program `servegym` and its commands."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Protocol

import tyro

from servegym.errors import ServeGymError, unknown_name


class Command(Protocol):
    """What the words of the command line are parsed into."""

    def run(self) -> None:
        """Do what the command is for."""


class Commands(Mapping[str, Callable[..., Command]]):
    """Commands by name; a module is imported when its command is taken.

    A command line names one, and what the others import would be most of what its start costs.

    Args:
        places: Module of `servegym.commands` and name in it, of each.
    """

    def __init__(self, places: dict[str, tuple[str, str]]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> Callable[..., Command]:
        module, within = self._places[name]
        command: Callable[..., Command] = getattr(
            import_module(f"servegym.commands.{module}"), within
        )
        return command

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


COMMANDS = Commands(
    {
        "demo": ("demo", "Demo"),
        "simulate": ("simulate", "Simulate"),
        "evaluate": ("evaluate", "Evaluate"),
        "train": ("train", "Train"),
        "search": ("search", "Search"),
        "record": ("record", "Record"),
        "tune": ("tune", "Tune"),
        "score": ("score", "Score"),
        "plan": ("plan", "Plan"),
        "leaderboard": ("leaderboard", "Leaderboard"),
        "export": ("export", "Export"),
        "fit": ("fit", "Fit"),
        "scenarios": ("scenarios", "Scenarios"),
        "policies": ("policies", "Policies"),
        "costs": ("costs", "Costs"),
        "compile": ("compile", "Compile"),
        "calibrate": ("calibrate", "Calibrate"),
        "validate": ("validate", "Validate"),
        "replay": ("replay", "Replay"),
        "estimate": ("estimate", "Estimate"),
        "schedule": ("schedule", "ScheduleDag"),
        "serve": ("serve", "Serve"),
        "bench": ("bench", "Bench"),
    }
)

DESCRIPTION = """Train, judge and ship schedulers for LLM serving clusters.

First steps: `servegym scenarios` and `servegym policies` list what there is;
`servegym evaluate --scenario mixed-chat` compares all rules; `servegym train --minutes 5` learns
one; `servegym evaluate --policies prefix-load runs/ppo-mixed-chat/policy/policy.onnx` judges it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; wrong input ends with one sentence and exit code 2.

    As do files that cannot be read or written. Ctrl-C ends with 130, and a reader that has gone,
    as in `servegym --help | head`, with 141, as for other programs.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        try:
            _parse(words).run()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        _close_output()
        raise SystemExit(141) from None
    except (ServeGymError, OSError) as error:
        raise _ended(_described(error), 2) from None
    except KeyboardInterrupt as stop:
        raise _ended(str(stop) or "interrupted", 130) from None


def _ended(sentence: str, code: int) -> SystemExit:
    print(f"servegym: {sentence}", file=sys.stderr)
    return SystemExit(code)


def _described(error: ServeGymError | OSError) -> str:
    """Say what is wrong with a file in a sentence, where nobody has yet."""
    if isinstance(error, ServeGymError) or not error.strerror:
        return str(error) or type(error).__name__
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror[:1].lower()}{error.strerror[1:]}"


def _close_output() -> None:
    """Send what is still to be printed nowhere, so that Python's end does not complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse(words: list[str]) -> Command:
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        raise ServeGymError(unknown_name("command", words[0], COMMANDS))
    _refuse_repeated(words)
    named = words[0] if words and words[0] in COMMANDS else None
    commands = dict(COMMANDS) if named is None else {named: COMMANDS[named]}
    if named in ("train", "search"):
        from servegym.commands.search import Search
        from servegym.commands.train import Train, train_command

        commands[named] = train_command(words[1:], Train if named == "train" else Search)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(
                commands, prog="servegym", description=DESCRIPTION, args=words or ["--help"]
            )
    except SystemExit as end:
        if not end.code:
            raise
        help_of = f"servegym {named}" if named else "servegym"
        raise ServeGymError(f"{_sentence(said.getvalue())}; see {help_of} --help") from None


def _refuse_repeated(words: list[str]) -> None:
    """Refuse an option given twice: the parser takes the last, and the other is lost unseen."""
    options = [word.split("=")[0].replace("_", "-") for word in words if word.startswith("--")]
    for option in options:
        if options.count(option) > 1:
            raise ServeGymError(f"{option} is given {options.count(option)} times: give it once")


def _sentence(box: str) -> str:
    """Take the message out of the box that tyro draws around it: what stands between its rules."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    parts = [""]
    for line in plain.splitlines():
        text = line.strip("│| ")
        if text.startswith("╭") or (text and not text.strip("─-")):
            parts.append("")  # a rule; the title is in it, or above it where lines are ASCII
        elif not text.startswith("╰"):
            parts[-1] += f" {text}"
    return " ".join(parts[1].split()).rstrip(".") if len(parts) > 1 else "wrong arguments"
