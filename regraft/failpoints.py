"""Named places where a test may kill or fail the process.

A failpoint does nothing unless `REGRAFT_TESTING=1` and `REGRAFT_FAILPOINT` names it:

    REGRAFT_FAILPOINT=commit_dir.manifest             kill -9 at the first passage
    REGRAFT_FAILPOINT=train.checkpoint@3              kill -9 at the third
    REGRAFT_FAILPOINT=commit_dir.write=ENOSPC         raise OSError(ENOSPC)
    REGRAFT_FAILPOINT=train.step@5=TERM               send SIGTERM to this process and go on

With `REGRAFT_FAILPOINT_LOG=FILE` every passage appends its name, so that a test can list all of them first.
"""

import errno
import os
import signal
from collections import Counter

_passages: Counter[str] = Counter()


def failpoint(name: str) -> None:
    """Mark a place before or after a write, a rename or a call to a service."""
    if os.environ.get("REGRAFT_TESTING") != "1":
        return
    if log := os.environ.get("REGRAFT_FAILPOINT_LOG"):
        with open(log, "a", encoding="utf-8") as file:  # noqa: PTH123 - one O_APPEND write, shared by processes
            file.write(name + "\n")
    wanted, _, action = os.environ.get("REGRAFT_FAILPOINT", "").partition("=")
    wanted, _, passage = wanted.partition("@")
    if wanted != name:
        return
    _passages[name] += 1
    if _passages[name] != int(passage or 1):
        return
    if action == "TERM":
        os.kill(os.getpid(), signal.SIGTERM)
    elif action:
        code = getattr(errno, action)
        raise OSError(code, os.strerror(code))
    else:
        os.kill(os.getpid(), signal.SIGKILL)
