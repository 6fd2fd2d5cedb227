"""Freed memory stays with the process, so a step clears no pages anew."""

from __future__ import annotations

import platform

import pytest
import torch

from cki_rec.engine.host_memory import keep_freed_memory

MEGABYTE = 2**20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries stay as they are")
def test_freed_tensors_are_taken_again_without_new_pages():
    import resource

    keep_freed_memory()
    before = 0
    for number in range(6):
        if number == 2:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(16 * MEGABYTE // 4)
    pages = 4 * 16 * MEGABYTE / resource.getpagesize()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < pages / 10


@pytest.mark.parametrize("platform_name", ["darwin", "win32"])
def test_other_systems_stay_as_they_are(monkeypatch, platform_name):
    monkeypatch.setattr("cki_rec.engine.host_memory.sys.platform", platform_name)
    monkeypatch.setattr("cki_rec.engine.host_memory.ctypes", None)
    keep_freed_memory()
