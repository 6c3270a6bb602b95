"""Ctrl-C and SIGTERM of a command reach the stage that it runs, and leave a checkpoint behind.

    with stop_on_signals():              # once, in the command
        with forwarded():                # around each stage: first signal -> SIGTERM to the stage's process group
            pipeline.repro(layout, "train")

Prefect puts its own SIGTERM handler in place while a flow runs; inside `forwarded()` ours is back. A flow run that a
worker started does not enter `stop_on_signals()`: there Prefect's handler raises, and `pipeline.repro` ends the group.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from regraft import pipeline

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_owned = False


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Let this command answer SIGINT and SIGTERM for the block: outside a stage both raise `KeyboardInterrupt`."""
    global _owned
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _interrupt) for number in SIGNALS}
    _owned = True
    try:
        yield
    finally:
        _owned = False
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def forwarded() -> Iterator[None]:
    """Send the first signal to the running stage and wait for its checkpoint; a second one ends the wait."""
    if not _owned or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _forward) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _forward(number: int, frame: FrameType | None) -> None:
    for each in SIGNALS:
        signal.signal(each, _interrupt)
    pipeline.stop_running(signal.SIGTERM)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)
