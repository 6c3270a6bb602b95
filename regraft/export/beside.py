"""Digests that are taken in a process of their own, beside work that holds Python's lock.

A thread would wait for the lock between any two blocks, and the import of torch alone holds it for more than a second.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from regraft.artifacts import digest_file

_DIGEST = """
import hashlib, mmap, os, sys
window = 64 * 2**20
for path in sys.argv[1:]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        for start in range(0, size, window):
            with mmap.mmap(file.fileno(), min(window, size - start), access=mmap.ACCESS_READ, offset=start) as view:
                digest.update(view)
    print(digest.hexdigest(), flush=True)
"""
"""Mapped, a window at a time: no copies. A file that shrinks meanwhile ends this process, and its starter sees that."""


@contextmanager
def digests_beside(folder: Path, names: Sequence[str]) -> Iterator[Callable[[], dict[str, str]]]:
    """Begin to digest files; what is yielded waits for the end of it and returns the sha256 of each file by its name.

    Where the other process fails (memory, a killed process), the files are digested here, so that the error is this
    process's own. It is ended with the block.
    """
    command = [sys.executable, "-I", "-S", "-c", _DIGEST, *(str(folder / name) for name in names)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:

        def finish() -> dict[str, str]:
            lines = process.communicate()[0].split()
            if process.returncode or len(lines) != len(names):
                return {name: digest_file(folder / name) for name in names}
            return dict(zip(names, lines, strict=True))

        try:
            yield finish
        finally:
            process.kill()
