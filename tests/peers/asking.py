"""The loop around a peer: work in, answers out; runs beside the peers."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def ask_all(ask: Callable[[dict[str, Any], Path], dict[str, float]]) -> None:
    """Read the work of the first argument, and add answers to the file of the second.

    An answer is a line of JSON. Work that has one is not asked again, so that a run that was ended
    goes on where it was.

    Args:
        ask: Takes a piece of work and a folder; returns figures, or raises what it says instead.
    """
    pieces, answers = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    known = set()
    if answers.is_file():
        known = {json.loads(line)["row_id"] for line in answers.read_text().splitlines()}
    with tempfile.TemporaryDirectory() as made, answers.open("a") as file:
        for i, piece in enumerate(pieces, 1):
            if piece["row_id"] in known:
                continue
            answer: dict[str, Any] = {"row_id": piece["row_id"]}
            try:
                answer["figures"] = ask(piece, Path(made))
            except Exception as error:  # whatever it raises is its answer
                answer["refused"] = (str(error).strip() or type(error).__name__).splitlines()[-1]
            file.write(json.dumps(answer) + "\n")
            file.flush()
            print(f"\r  {i} of {len(pieces)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
