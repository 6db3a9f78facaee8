"""Under what conditions a measurement was taken: without this a latency is only a number."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from graphopt.capabilities import host_features

_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_PACKAGES = {
    "numpy": "numpy",
    "onnx": "onnx",
    "onnxruntime": "onnxruntime",
    "tvm": "apache-tvm",
    "graphopt": "graphopt",
}


@dataclass(frozen=True)
class Environment:
    """`machine` must be equal for two latencies to be comparable; `versions` may be what is being compared."""

    machine: Mapping[str, str | int]
    versions: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        """sha256 of `machine`."""
        return hashlib.sha256(json.dumps(dict(self.machine), sort_keys=True).encode()).hexdigest()

    def differences(self, other: Environment) -> tuple[str, ...]:
        """What of the machine differs, as `key: here, there`; empty exactly when the fingerprints are equal."""
        keys = sorted(set(self.machine) | set(other.machine))
        return tuple(
            f"{key}: {self.machine.get(key, 'not recorded')}, {other.machine.get(key, 'not recorded')}"
            for key in keys
            if self.machine.get(key) != other.machine.get(key)
        )

    def to_dict(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "machine": dict(self.machine), "versions": dict(self.versions)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Environment:
        return cls(dict(data["machine"]), dict(data["versions"]))


def environment(threads: int) -> Environment:
    """The conditions of this machine and process now. Imports none of the packages whose versions it records."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    machine: dict[str, str | int] = {
        "cpu": _cpu_model(),
        "features": hashlib.sha256(" ".join(sorted(host_features())).encode()).hexdigest()[:16],
        "cores": os.cpu_count() or 1,
        "usable_cores": usable,
        "threads": threads,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    governor = _read(_GOVERNOR)
    if governor is not None:
        machine["governor"] = governor
    versions = {"python": platform.python_version()}
    for name, package in _PACKAGES.items():
        try:
            versions[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return Environment(machine, versions)


def fingerprint(threads: int = 0) -> dict[str, Any]:
    """`environment` as a JSON-able dict, for reports. `threads` 0: not applicable."""
    return environment(threads).to_dict()


def _cpu_model() -> str:
    """Model name; where a virtual machine hides it, family, model and stepping tell processors apart."""
    found: dict[str, str] = {}
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    if "model name" in found:
        numbers = (found.get(key, "?") for key in ("cpu family", "model", "stepping"))
        return f"{found['model name']} ({'/'.join(numbers)})"
    return found.get("CPU part") or platform.processor() or platform.machine()


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
