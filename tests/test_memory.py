"""The allocator's setting, in a process of its own."""

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, torch
from c2r.train.memory import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(4_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
torch.set_num_threads(1)
default, agreed = faults(), keep_freed_memory()
faults()
print(default, agreed, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_blocks_are_reused() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    default, agreed, kept = done.stdout.split()
    assert agreed == "True"
    assert int(kept) < int(default) / 10
