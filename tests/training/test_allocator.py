"""The allocator's settings, each tested in a new process."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")

CODE = """
import resource, torch
from c2r.memory import keep_freed_memory
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


def test_freed_blocks_are_reused() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    default, agreed, kept = done.stdout.split()
    assert agreed == "True"
    assert int(kept) < int(default) / 10


SHARED = """
import threading, torch
from c2r.memory import keep_freed_memory
def in_the_heap():
    line = next(line for line in open("/proc/self/maps") if "[heap]" in line)
    first, last = (int(end, 16) for end in line.split()[0].split("-"))
    held.append(torch.ones(1_000_000))
    found.append(first <= held[-1].data_ptr() < last)
held, found, agreed = [], [], WANTED and keep_freed_memory()
torch.ones(4_000_000)  # what is freed of it is there for the thread
thread = threading.Thread(target=in_the_heap)
thread.start()
thread.join()
print(*found)
"""


@pytest.mark.parametrize("wanted", [False, True])
def test_threads_share_a_heap(wanted: bool) -> None:
    code = SHARED.replace("WANTED", str(wanted))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(wanted)]


GIVEN_BACK = """
import torch
from pathlib import Path
from c2r.memory import give_freed_memory_back, keep_freed_memory
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
keep_freed_memory()
before = resident()
blocks = [torch.ones(250_000) for _ in range(200)]
last = torch.ones(1)  # so that the heap's end is in use
del blocks
kept = resident() - before
give_freed_memory_back()
print(kept, resident() - before)
"""


def test_what_is_kept_is_given_back_when_asked() -> None:
    done = subprocess.run([sys.executable, "-c", GIVEN_BACK], capture_output=True, text=True, check=True)
    kept, left = map(int, done.stdout.split())
    assert kept > 190e6
    assert left < 20e6
