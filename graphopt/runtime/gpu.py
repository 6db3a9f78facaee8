"""Which GPUs this machine has, asked of NVIDIA's driver directly: neither TVM nor the CUDA toolkit is needed."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

REMEDY = "build here and run on a machine with an NVIDIA GPU and its driver"
RUNTIME = "libcudart.so.13"
_DRIVER = "libcuda.so.1"
_NAME_BYTES = 256
_MAJOR, _MINOR, _MULTIPROCESSORS = 75, 76, 16
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT."""


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL | str:
    """The driver's library, initialised; or why there is none, in words."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return f"no NVIDIA driver on this machine ({_DRIVER})"
    status = driver.cuInit(0)
    if status:
        return f"the NVIDIA driver does not start (error {status} of cuInit): is there a GPU?"
    count = ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "the NVIDIA driver finds no GPU"
    return driver


def missing() -> str | None:
    """Why nothing can run on a GPU here, in words; None where it can."""
    found = _driver()
    if isinstance(found, str):
        return found
    return None if find_runtime() else f"CUDA's runtime library ({RUNTIME}) is not on this machine"


def find_runtime() -> str | None:
    """Where CUDA's runtime library is: the dynamic linker's name of it, or a file of NVIDIA's Python package."""
    try:
        ctypes.CDLL(RUNTIME, mode=ctypes.RTLD_GLOBAL)
        return RUNTIME
    except OSError:
        pass
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(f) / "cu13" / "lib" for f in (spec.submodule_search_locations or ())] if spec else []
    for folder in [*folders, Path("/usr/local/cuda/lib64")]:
        if (folder / RUNTIME).is_file():
            return str(folder / RUNTIME)
    return None


def names() -> list[str]:
    """The GPUs as their driver calls them, and their architectures; empty: there is none."""
    return [f"{each['name']} ({each['arch']})" for each in describe()]


def describe() -> list[Mapping[str, str | int]]:
    """What other machines want to know of each GPU: name, arch, memory_bytes, multiprocessors; empty: there is none."""
    driver = _driver()
    if isinstance(driver, str):
        return []
    count, found = ctypes.c_int(), []
    driver.cuDeviceGetCount(ctypes.byref(count))
    for index in range(count.value):
        text = ctypes.create_string_buffer(_NAME_BYTES)
        driver.cuDeviceGetName(text, _NAME_BYTES, index)
        found.append(
            {
                "name": text.value.decode(errors="replace"),
                "arch": _architecture(driver, index),
                "memory_bytes": _memory_bytes(driver, index),
                "multiprocessors": _attribute(driver, _MULTIPROCESSORS, index),
            }
        )
    return found


def has_driver() -> bool:
    """Whether NVIDIA's driver is installed. It is not started: a process that has done so must not fork."""
    try:
        ctypes.CDLL(_DRIVER)
    except OSError:
        return False
    return True


def architecture() -> str | None:
    """`sm_90`: of the first GPU; None where there is none."""
    driver = _driver()
    return None if isinstance(driver, str) else _architecture(driver, 0)


def runs(arch: str) -> bool:
    """Whether the first GPU runs machine code made for `arch`: its own, or an earlier one of the same major number."""
    here = architecture()
    return here is not None and runs_on(arch, here)


def runs_on(arch: str, here: str) -> bool:
    """Whether a GPU of the architecture `here` runs machine code made for `arch`."""
    (major, minor), (own_major, own_minor) = _numbers(arch), _numbers(here)
    return major == own_major and minor <= own_minor


def _numbers(arch: str) -> tuple[int, int]:
    digits = arch.removeprefix("sm_")
    return int(digits[:-1]), int(digits[-1])


def memory_bytes() -> int | None:
    """Of the first GPU; None where there is none."""
    driver = _driver()
    return None if isinstance(driver, str) else _memory_bytes(driver, 0) or None


def multiprocessors() -> int | None:
    """Of the first GPU; None where there is none."""
    driver = _driver()
    return None if isinstance(driver, str) else _attribute(driver, _MULTIPROCESSORS, 0)


def _architecture(driver: ctypes.CDLL, index: int) -> str:
    return f"sm_{_attribute(driver, _MAJOR, index)}{_attribute(driver, _MINOR, index)}"


def _memory_bytes(driver: ctypes.CDLL, index: int) -> int:
    """0 where the driver does not say."""
    value = ctypes.c_size_t()
    return value.value if driver.cuDeviceTotalMem_v2(ctypes.byref(value), index) == 0 else 0


def _attribute(driver: ctypes.CDLL, which: int, index: int) -> int:
    value = ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(value), which, index)
    return value.value
