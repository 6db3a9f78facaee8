"""A farm on one machine: TVM's tracker, three emulated devices, and `graphopt optimize` over them while one is killed.

    python benchmarks/farm.py [MODEL.onnx OPTIONS...]

Prints what the commands print. Times are the emulator's and say nothing about a device; the point is that every trial
has its result. Needs `apt install qemu-user g++-aarch64-linux-gnu` and `pip install 'graphopt[farm]'`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import psutil

from graphopt.remote.emulator import emulated_process

DIGITS = Path(__file__).resolve().parent.parent / "examples" / "digits"
KEY, DEVICES, PORT = "rpi4", 3, 9190
SESSIONS = 4
"""The one that is killed is at its fourth."""
USUAL = [
    str(DIGITS / "digits.onnx"), "--eval", str(DIGITS / "eval.npz"), "--calib", str(DIGITS / "calib.npz"),
    "--preset", "exact", "--tune-seconds", "40", "--measure-seconds", "6",
]  # fmt: skip


def graphopt(*arguments: str) -> str:
    line = [sys.executable, "-m", "graphopt.cli", *arguments]
    environment = {**os.environ, "COLUMNS": "110"}
    done = subprocess.run(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, check=False
    )
    return done.stdout


def kill_at_work(server: subprocess.Popen[str], tracker: str) -> None:
    """End a device and its session in the middle of a trial."""
    sessions, inside = 0, False
    while sessions < SESSIONS:
        busy = bool(psutil.Process(server.pid).children())
        sessions += busy and not inside
        inside = busy
        time.sleep(0.002)
    os.killpg(server.pid, signal.SIGKILL)
    print(f"--- one device is killed\n{graphopt('farm', 'status', '--tracker', tracker)}", flush=True)


def main(arguments: list[str]) -> None:
    from tvm.rpc.tracker import Tracker

    running = Tracker("127.0.0.1", port=PORT, port_end=PORT + 100, silent=True)
    tracker = f"127.0.0.1:{running.port}"
    with ExitStack() as ending, tempfile.TemporaryDirectory() as folder:
        ending.callback(running.terminate)
        options = ("--tracker", tracker)
        servers = [
            ending.enter_context(emulated_process("aarch64", "cortex-a72", KEY, options))[0] for _ in range(DEVICES)
        ]
        time.sleep(2)
        print(graphopt("farm", "status", "--tracker", tracker), flush=True)
        threading.Thread(target=kill_at_work, args=(servers[0], tracker), daemon=True).start()
        remote = ["--target", "arm{device=rpi4,threads=1}", "--remote", f"tracker:{tracker}/{KEY}"]
        print(graphopt("optimize", *(arguments or USUAL), "-o", f"{folder}/out", *remote))
        print(graphopt("farm", "status", "--tracker", tracker))


if __name__ == "__main__":
    main(sys.argv[1:])
