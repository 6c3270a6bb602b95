"""The process begins anew once, with its arguments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
from regraft.preprocess.malloc import keep_small_blocks
keep_small_blocks()
print(os.environ["GLIBC_TUNABLES"], sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
@pytest.mark.parametrize("given", [None, "glibc.malloc.tcache_count=9"])
def test_the_setting_is_made_once_and_a_users_own_stays(given: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])} | ({"GLIBC_TUNABLES": given} if given else {})
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "--rows", "a b"], env=environment, stdout=subprocess.PIPE, text=True
    )
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said == f"{given or 'glibc.malloc.tcache_count=500'} ['--rows', 'a b']\n"
