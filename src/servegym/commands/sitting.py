"""What a sitting of a training run says: how it begins, and where it can go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from servegym.commands.console import make_console

if TYPE_CHECKING:
    from servegym.train.run_folder import RunFolder


class Trainer(Protocol):
    """What all trainers have in common."""

    finished: bool
    folder: RunFolder

    def prepare(self) -> float:
        """Compile and begin; return the seconds that took."""
        ...


@contextmanager
def sitting(trainer: Trainer) -> Iterator[None]:
    """Prepare a trainer, say what took how long, and on Ctrl-C what is saved.

    Raises:
        KeyboardInterrupt: With a sentence in it.
    """
    console, folder = make_console(), trainer.folder
    try:
        took_s = trainer.prepare()
        where = f"{folder.path}, after {folder.saved}" if folder.saved else str(folder.path)
        if trainer.finished:
            said = f"finished with this configuration: {where}; the policy is written again"
        else:
            said = f"compiled and prepared in {took_s:.0f} s, which no budget counts; training in "
            said += where
        console.print(said, soft_wrap=True, highlight=False)
        yield
    except KeyboardInterrupt:
        kept = "nothing was saved yet"
        if folder.saved:
            kept = f"{folder.path} holds {folder.saved}, and the same command goes on from there"
        raise KeyboardInterrupt(f"interrupted; {kept}") from None
