"""Processes that share the work of a stage: how many, how they start and how they end; none outlives its starter."""

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.context import BaseContext

from regraft.errors import RegraftError

FORKED = sys.platform == "linux"
"""Whether a new process finds what its starter held."""


def cores() -> int:
    """Return how many processes to start: the cores that this one may use, or what REGRAFT_WORKERS says."""
    given = os.environ.get("REGRAFT_WORKERS", "")
    if given.isdigit() and int(given):
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def context() -> BaseContext:
    """Return how processes are started here."""
    return multiprocessing.get_context("fork" if FORKED else "spawn")


def follow(starter: int) -> None:
    """In a new process: end with the process `starter`, and leave an interrupt to it. Rows hold no cycles to look for."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphan goes on
    if os.getppid() != starter:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the starter is told, and ends them
    collect_seldom()


def collect_seldom() -> None:
    """Let Python look for cycles after hundreds of thousands of objects: those of rows hold none."""
    gc.set_threshold(200_000, 50, 100)


@contextmanager
def explained(did: str) -> Iterator[None]:
    """Say what a pool did of which a process was killed.

    Raises:
        RegraftError: one was.
    """
    try:
        yield
    except BrokenProcessPool as error:
        raise RegraftError(
            f"a process that {did} was killed, probably for want of memory",
            fix="free some memory, or set REGRAFT_WORKERS to fewer processes, and run the same command again",
        ) from error
