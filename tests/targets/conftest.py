"""Emulated ARM processors, started once and shared."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from graphopt.errors import TargetError
from graphopt.remote.address import Address
from graphopt.remote.emulator import emulated


@pytest.fixture(scope="session")
def arm_cache(tmp_path_factory):
    """One folder for TVM's ARM libraries and the server: they are fetched and compiled once."""
    return tmp_path_factory.mktemp("arm-cache")


@pytest.fixture(scope="session")
def device(arm_cache):
    """A function from QEMU's name of a core to the address of one; skips where there is no emulator."""
    with ExitStack() as running:
        started: dict[str, Address] = {}

        def start(cpu: str) -> Address:
            if cpu not in started:
                try:
                    with pytest.MonkeyPatch.context() as patch:
                        patch.setenv("GRAPHOPT_CACHE", str(arm_cache))
                        started[cpu] = running.enter_context(emulated("aarch64", cpu))
                except TargetError as error:
                    pytest.skip(f"{error}; {error.hint}")
            return started[cpu]

        yield start
