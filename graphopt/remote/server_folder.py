"""A folder with the RPC server for a device without Python: copied there, it runs as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

from graphopt.errors import ArtifactError
from graphopt.remote.runtime_libraries import GPU_PART, LIBRARIES
from graphopt.remote.server_program import server_program

PROGRAM = "rpc_server"


def write_server(arch: str, folder: Path) -> tuple[Path, ...]:
    """Put the program for `arch` and its libraries into `folder`, which is made; returns the files.

    Raises TargetError where it cannot be compiled, ArtifactError where it cannot be written.
    """
    program = server_program(arch)
    sources = {PROGRAM: program, **{name: program.parent / name for name in (*LIBRARIES, GPU_PART)}}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tuple(Path(shutil.copy2(source, folder / name)) for name, source in sources.items())
    except OSError as error:
        raise ArtifactError(f"cannot write {folder}: {error.strerror or error}") from error
