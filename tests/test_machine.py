"""The versions and the machine of a run, and the memory of the machine and of a process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sparsefit.machine import free_host_memory, host_memory, machine, memory_held, peak_memory, process_memory, versions


def test_versions_name_what_is_installed():
    assert {"python", "torch", "lightning", "rich"} & set(versions()) == {"python", "torch", "lightning"}
    assert all(version and version[0].isdigit() for version in versions().values())


def test_the_machine_is_described():
    found = machine()
    assert set(found) == {"platform", "cpu", "cpu_count", "cpu_usable", "memory_bytes", "devices"}
    assert 1 <= found["cpu_usable"] <= found["cpu_count"]
    assert found["memory_bytes"] > 2**28


@pytest.mark.slow
def test_peak_memory_sees_what_was_held():
    code = "from sparsefit.machine import peak_memory as peak; before, _ = peak(); held = bytearray(200 * 2**20);"
    code += "print(peak()[0] - before, peak()[1])"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    grown, kind = done.stdout.split(maxsplit=1)
    assert 150 * 2**20 < int(grown) < 300 * 2**20
    assert kind.strip() == "process memory (CPU)"
    assert peak_memory()[0] > 0


def test_peak_memory_is_that_of_the_fullest_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: (5, 7)[device])
    assert peak_memory() == (7, "device memory")


def test_the_memory_of_the_process_and_of_the_machine_are_told_apart(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = process_memory()
    held = bytearray(100 * 2**20)
    assert 80 * 2**20 < process_memory() - before < 200 * 2**20
    assert len(held) < memory_held() <= host_memory()
    assert 0 < free_host_memory() < host_memory()
