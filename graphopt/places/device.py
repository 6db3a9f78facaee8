"""A device that is reached over RPC: candidates run and are timed there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from graphopt.errors import MeasurementError
from graphopt.measure import Contender, Environment, PairedResult, environment
from graphopt.measure.paired import join_sessions, take_turns
from graphopt.places.base import Place
from graphopt.progress import Progress
from graphopt.remote.address import Address
from graphopt.remote.device import Device, check_gpu, check_instructions
from graphopt.remote.farm import RemoteDevices
from graphopt.remote.session import connected
from graphopt.targets.base import Target
from graphopt.targets.cuda import Cuda
from graphopt.targets.llvm import LlvmTarget
from graphopt.verify import Feeds, Runner


class OnDevice(Place):
    """`address`: of a server, or of a tracker that knows several devices of one key. Contenders are compiled folders.

    Raises DeviceError: nobody answers, another version of TVM; SpecError: wrong key; TargetError: the device lacks what
    code for `target` needs.
    """

    kind = "device"

    def __init__(self, address: Address, target: LlvmTarget | Cuda | None = None):
        self.address = address
        with connected(address) as session:
            self.device: Device = session.device
            if isinstance(target, Cuda):
                whole = cast(Cuda, self.completed(target))
                check_gpu(whole.gpu_arch, self.device, session.where, str(target))
                check_instructions(whole.host_arch, frozenset(), self.device, session.where, str(target))
            elif target is not None:
                check_instructions(target.arch, target.features, self.device, session.where, str(target))

    @property
    def label(self) -> str:
        return f"{self.address} ({self.device.name})"

    def completed(self, target: Target) -> Target:
        """A GPU that is not named is the device's first, and a name does not say how many multiprocessors it has."""
        if not isinstance(target, Cuda) or not self.device.gpus:
            return target
        here = self.device.gpus[0]
        if target.arch or target.device:
            same = here.arch == target.gpu_arch and not target.sms
            return dataclasses.replace(target, sms=here.multiprocessors) if same else target
        return dataclasses.replace(
            target, arch=here.arch, host=target.host or self.device.arch, sms=target.sms or here.multiprocessors
        )

    @property
    def devices(self) -> RemoteDevices:
        return RemoteDevices(self.address, self.device)

    def warnings(self) -> list[str]:
        if not self.device.emulated:
            return []
        return [f"{self.address} is emulated: its times say nothing about a device, and the choice rests on them"]

    def describe(self) -> Mapping[str, Any]:
        return {**super().describe(), "device": self.device.to_dict()}

    @contextmanager
    def open(self, contender: Contender, threads: int | None) -> Iterator[Runner]:
        from graphopt.remote.engine import RemoteEngine

        with connected(self.address) as session:
            session.use_threads(threads)
            yield RemoteEngine(contender.path, session).run

    def race(
        self,
        contenders: Sequence[Contender],
        feeds: Sequence[Feeds],
        *,
        threads: int,
        seconds: float,
        seed: int,
        progress: Progress,
    ) -> PairedResult:
        """A session for each of `feeds`: bursts of all contenders in turns, in a new random order each round."""
        from graphopt.remote.lineup import RemoteLineup

        runs = []
        for number, each in enumerate(feeds):
            with connected(self.address) as session:
                session.use_threads(threads)
                lineup = RemoteLineup(contenders, session, each)
                taken = take_turns(lineup, seconds / len(feeds), None, seed + number, progress)
                if not taken:
                    raise MeasurementError("; ".join(lineup.failed.values()))
                conditions = _conditions(session.device, threads)
                runs.append(PairedResult(taken, threads, seed, conditions, dict(lineup.failed)))
        return join_sessions(runs)


def _conditions(device: Device, threads: int) -> Environment:
    """Two latencies are comparable when these are equal; versions are this machine's, which compiled."""
    machine: dict[str, str | int] = {
        "cpu": device.name,
        "features": device.fingerprint,
        "cores": len(device.cores),
        "threads": threads,
        "system": f"{device.system} {device.arch}",
    }
    return Environment(machine, environment(threads).versions)
