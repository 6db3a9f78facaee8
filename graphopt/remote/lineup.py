"""Compiled models on one device that take turns: what `graphopt.measure` times, elsewhere.

All lie in one session, so in one process there: a device serves one session at a time. Bursts are as long as those on
this machine, and by the device's own clock, so that the network is not in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from graphopt.errors import DeviceError, MeasurementError, TargetError
from graphopt.measure import Contender
from graphopt.measure.lineup import BURST_RUNS, BURST_S, KEEP
from graphopt.remote.engine import RemoteEngine
from graphopt.remote.session import Session


class RemoteRacer:
    """One contender in the session. Raises what `RemoteEngine` raises."""

    def __init__(self, contender: Contender, session: Session, number: int, feeds: Mapping[str, np.ndarray]):
        self.engine = RemoteEngine(contender.path, session, f"{number}.so")
        self.engine.feed(feeds)
        first = min(self.engine.times_s(2))  # it warms up, too
        self.runs = int(min(max(BURST_S / max(first, 1e-9), BURST_RUNS), KEEP))

    def burst(self) -> tuple[float, ...]:
        """Latencies in seconds of one turn. Raises MeasurementError where it fails, DeviceError where the device is
        lost."""
        try:
            return self.engine.times_s(self.runs)
        except DeviceError:
            raise
        except TargetError as error:
            raise MeasurementError(str(error)) from error


class RemoteLineup:
    """Contenders that are loaded and warm; `failed` tells why others are not among `racers`.

    Raises DeviceError where the device is lost.
    """

    def __init__(self, contenders: Sequence[Contender], session: Session, feeds: Mapping[str, np.ndarray]):
        self.racers: dict[str, RemoteRacer] = {}
        self.failed: dict[str, str] = {}
        for number, contender in enumerate(contenders):
            try:
                self.racers[contender.name] = RemoteRacer(contender, session, number, feeds)
            except DeviceError:
                raise
            except TargetError as error:
                self.failed[contender.name] = str(error)

    def drop(self, name: str, error: MeasurementError) -> None:
        """Leave a contender out from here on."""
        self.racers.pop(name).engine.close()
        self.failed[name] = str(error)
