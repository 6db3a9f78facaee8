"""Writing a folder whole or not at all: everything is written beside it, then renamed into place."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graphopt.errors import ArtifactError
from graphopt.runtime.artifact import MANIFEST


def check_output(path: str | os.PathLike[str], overwrite: bool, marker: str = MANIFEST) -> None:
    """Refuse early what could not be written at the end; only folders with a file `marker` are replaced.

    Raises ArtifactError.
    """
    folder = Path(path).absolute()
    parent = folder.parent
    if folder.exists() or folder.is_symlink():
        if not overwrite:
            raise ArtifactError(f"{path} exists", hint="give --overwrite to replace it, or another -o")
        if not folder.is_dir() or folder.is_symlink():
            raise ArtifactError(f"{path} is not a folder; it is left alone", hint="give another -o")
        if any(folder.iterdir()) and not (folder / marker).is_file():
            what = "an artifact" if marker == MANIFEST else "a package"
            raise ArtifactError(f"{path} is not {what}; it is left alone", hint="give another -o")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise _unwritable(parent, error) from error


@contextmanager
def staged(path: str | os.PathLike[str], overwrite: bool, marker: str = MANIFEST) -> Iterator[Path]:
    """A fresh folder to write into; it takes the name `path` when the block ends well, and vanishes otherwise.
    `overwrite` and `marker`: see `check_output`.

    Raises ArtifactError for a full disk or a folder that cannot be written.
    """
    folder = Path(path).absolute()
    check_output(folder, overwrite, marker)
    stage = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        yield stage
        check_output(folder, overwrite, marker)  # somebody may have made it meanwhile
        stage.chmod(0o777 & ~_umask())  # mkdtemp makes folders private
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
            folder.rename(old / folder.name)
            stage.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
        else:
            stage.rename(folder)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _unwritable(folder: Path, error: OSError) -> ArtifactError:
    if error.errno == errno.ENOSPC:
        return ArtifactError(f"the disk of {folder} is full: nothing was written", hint="free some space and run again")
    return ArtifactError(f"cannot write {folder}: {error.strerror or error}", hint="give another -o")
