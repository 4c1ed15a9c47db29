"""What a sitting of a training run says: how it begins, how it goes, and where it can go on."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from servegym.commands.console import make_console

if TYPE_CHECKING:
    from servegym.train.tracking import TrackerName
    from servegym.train.training_run import TrainingRun


def trained(trainer: TrainingRun[Any, Any, Any], trackers: Sequence[TrackerName] = ()) -> Path:
    """Train to the end and export; return the policy's file.

    Args:
        trainer: The run.
        trackers: Who else takes what it logs.
    """
    columns = (TextColumn("[bold]{task.description}"), BarColumn())
    with _tracked(trainer, trackers), _sitting(trainer), _interruptible() as stop_if_asked:
        with Progress(*columns, TimeRemainingColumn()) as bar:
            task = bar.add_task("training", total=1.0)

            def show(text: str, share: float) -> None:
                stop_if_asked()
                bar.update(task, description=text, completed=share)

            trainer.run(show)
        return trainer.export()


@contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
    """Yield what raises a Ctrl-C that was pressed and led to nothing.

    Python drops an exception that is raised in a destructor or in a callback of foreign code, and
    for long stretches of training the main thread is in these: Ctrl-C would do nothing at all.
    """
    pressed = False

    def interrupt(number: int, frame: object) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    def stop_if_asked() -> None:
        if pressed:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    ours = before is signal.default_int_handler and current_thread() is main_thread()
    if ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield stop_if_asked
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


@contextmanager
def _tracked(
    trainer: TrainingRun[Any, Any, Any], trackers: Sequence[TrackerName]
) -> Iterator[None]:
    """Open trackers of a run, and close them however the sitting ends."""
    if not trackers:
        yield
        return
    from servegym.train.tracking import TRACKERS

    trainer.trackers = [TRACKERS[name](trainer.folder) for name in trackers]
    try:
        yield
    finally:
        for tracker in trainer.trackers:
            tracker.close(finished=trainer.finished)


@contextmanager
def _sitting(trainer: TrainingRun[Any, Any, Any]) -> Iterator[None]:
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
