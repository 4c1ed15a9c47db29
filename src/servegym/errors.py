"""The one tree of errors that servegym raises for wrong input."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ServeGymError(Exception):
    """Base of all errors a user can cause; its message is one sentence that says what to do."""


class ConfigError(ServeGymError):
    """Raised when a scenario, a setting or a name is not allowed."""


class OutputError(ServeGymError):
    """Raised when a file or folder cannot be written, such as on a full or read-only disk."""


class UnknownSetting(ConfigError, TypeError):
    """Raised when a class is given a keyword that it does not know, as Python itself would."""


class WorkloadError(ServeGymError):
    """Raised when a trace or a request table cannot be used as it is."""


class InvalidAction(ServeGymError):
    """Raised when an action is outside the space or masked."""


class PolicyError(ServeGymError):
    """Raised when a policy answers with something that cannot be used."""


class ResetNeeded(ServeGymError):
    """Raised when `step` is called before `reset`, or after the end of an episode."""


class EnvironmentClosed(ServeGymError):
    """Raised when an environment is used after `close`."""


class ExportError(ServeGymError):
    """Raised when a policy file and its manifest do not belong together or cannot be read."""


def unknown_name(kind: str, got: str, allowed: Iterable[str]) -> str:
    """Say that a name is unknown, which ones are known and which is nearest.

    Args:
        kind: What the name stands for, in the singular, e.g. `"policy"`.
        got: The name that was given.
        allowed: All names that would have been accepted.

    Returns:
        One sentence.
    """
    names = sorted(allowed)
    begun = [name for name in names if got and name.lower().startswith(got.lower())]
    near = begun[:3] or difflib.get_close_matches(got, names, n=1)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"unknown {kind} {got!r}: choose one of {', '.join(names)}{hint}"
