"""The process begins anew once, with its arguments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import os, sys
from regraft.preprocess.malloc import keep_small_blocks
keep_small_blocks()
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[1:])
"""
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")


def said(script: str, *args: str, **given: str) -> str:
    """What a process says that runs the script, with none of the variables that the function looks at but those given."""
    kept = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "REGRAFT_BEGUN")}
    done = subprocess.run(
        [sys.executable, "-c", script, *args],
        env={**kept, "PYTHONPATH": str(ROOT), **given},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@ON_LINUX
@pytest.mark.parametrize("given", [None, "glibc.malloc.tcache_count=9"])
def test_the_setting_is_made_once_and_a_users_own_stays(given: str | None) -> None:
    own = {} if given is None else {"GLIBC_TUNABLES": given}
    assert said(SCRIPT, "--rows", "a b", **own) == f"{given or 'glibc.malloc.tcache_count=500'} ['--rows', 'a b']\n"


@ON_LINUX
def test_where_the_setting_does_not_survive_the_process_begins_anew_once(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        f"echo again >> {begun}\n"
        f"[ $(wc -l < {begun}) -lt 4 ] || exit 9\n"
        "unset GLIBC_TUNABLES\n"
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)

    assert said(f"import sys; sys.executable = {str(python)!r}\n{SCRIPT}", "--rows") == "None ['--rows']\n"
    assert begun.read_text() == "again\n"
