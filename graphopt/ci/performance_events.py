"""Counting the instructions of this thread by the processor's own counter, through Linux's perf_event_open(2).

Only user space is counted, which needs no privilege where /proc/sys/kernel/perf_event_paranoid is 2 or less. Most
virtual machines hide the counter.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import struct
import sys
from collections.abc import Callable

_SYSCALL = {"x86_64": 298, "aarch64": 241}
_SIZE = 112  # PERF_ATTR_SIZE_VER5: all kernels since 4.1 know it
_DISABLED, _EXCLUDE_KERNEL, _EXCLUDE_HYPERVISOR = 1 << 0, 1 << 5, 1 << 6
_ENABLE, _DISABLE, _RESET = 0x2400, 0x2401, 0x2403
HARDWARE_INSTRUCTIONS = (0, 1)
"""Type and configuration: PERF_TYPE_HARDWARE, PERF_COUNT_HW_INSTRUCTIONS."""
SOFTWARE_TASK_CLOCK = (1, 1)
"""PERF_TYPE_SOFTWARE, PERF_COUNT_SW_TASK_CLOCK: nanoseconds of the thread; there where the counters are not."""


class Counter:
    """A counter of the calling thread. Raises OSError where the system has none, or does not let it be used."""

    def __init__(self, event: tuple[int, int] = HARDWARE_INSTRUCTIONS) -> None:
        number = _SYSCALL.get(platform.machine())
        if sys.platform != "linux" or number is None:
            raise OSError("performance counters are read on Linux only, on x86-64 and aarch64")
        kind, config = event
        flags = _DISABLED | _EXCLUDE_KERNEL | _EXCLUDE_HYPERVISOR
        # struct perf_event_attr: type, size, config, sample_period, sample_type, read_format, flags
        attributes = struct.pack("=IIQQQQQ", kind, _SIZE, config, 0, 0, 0, flags).ljust(_SIZE, b"\0")
        libc = ctypes.CDLL(None, use_errno=True)
        arguments = [ctypes.c_long(value) for value in (0, -1, -1, 0)]  # this thread, any processor, no group, no flags
        self._file = libc.syscall(ctypes.c_long(number), ctypes.c_char_p(attributes), *arguments)
        if self._file < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def count(self, work: Callable[[], object]) -> int:
        """What was counted during `work`."""
        fcntl.ioctl(self._file, _RESET, 0)
        fcntl.ioctl(self._file, _ENABLE, 0)
        work()
        fcntl.ioctl(self._file, _DISABLE, 0)
        return int.from_bytes(os.read(self._file, 8), sys.byteorder)

    def close(self) -> None:
        os.close(self._file)
