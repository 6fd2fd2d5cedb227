"""Freed memory stays with the process, so a step clears no pages anew."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from cki_rec.engine.host_memory import keep_freed_memory

SCRIPT = """
import resource, sys, torch
from cki_rec.engine.host_memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
for number in range(24):
    if number == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(40 * 2**20 // 4)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""A process of its own, because faults of other threads count too.

The first tensors only fill the C library's lists of small pieces that aligning leaves over.
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries stay as they are")
def test_freed_tensors_are_taken_again_without_new_pages():
    faults = {}
    for kind in ("kept", "as_is"):
        command = [sys.executable, "-c", SCRIPT, kind]
        faults[kind] = int(subprocess.run(command, check=True, capture_output=True).stdout)
    assert faults["kept"] < faults["as_is"] / 10


@pytest.mark.parametrize("platform_name", ["darwin", "win32"])
def test_other_systems_stay_as_they_are(monkeypatch, platform_name):
    monkeypatch.setattr("cki_rec.engine.host_memory.sys.platform", platform_name)
    monkeypatch.setattr("cki_rec.engine.host_memory.ctypes", None)
    keep_freed_memory()
