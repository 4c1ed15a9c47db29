"""Policies put together of several, `DISPATCH+ORDER`: how their names are read and written."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

#: Stands between the parts; before a digit it belongs to a number, `weight=1e+3`.
_BETWEEN = re.compile(r"\+(?=[^\d.+])")


def split_parts(text: str) -> tuple[str, ...]:
    """Split a policy's text into those of its parts; most have one.

    Args:
        text: Rules with their parameters, or files of learned policies, with a plus between them:
            `"added-delay:decode=2+footprint"`. A file of that name is taken whole.

    Returns:
        The texts, at least one.
    """
    return (text,) if Path(text).is_file() else tuple(_BETWEEN.split(text))


def join_parts(texts: Iterable[str]) -> str:
    """Put the texts of parts together; the inverse of `split_parts`."""
    return "+".join(texts)
