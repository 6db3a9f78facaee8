"""Writing a folder whole or not at all: everything is written beside it, then renamed into place.

An old folder is exchanged for the new one in one step where the system can (Linux), so that whoever looks sees one or
the other, and a run that is killed at any moment leaves one of them. What a killed run left beside, the next run for
the same folder clears away: a lock that ended with its process tells it from the work of one that still runs.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from graphopt.errors import ArtifactError
from graphopt.runtime.artifact import MANIFEST

PARTIAL, OLD = ".partial-", ".old-"


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
    try:
        with _lock(folder.parent):  # so that nobody clears a stage away before it has its own lock
            _clear_leftovers(folder)
            stage = Path(tempfile.mkdtemp(prefix=f".{folder.name}{PARTIAL}", dir=folder.parent))
            hold = ExitStack()
            hold.enter_context(_lock(stage))
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield stage
        check_output(folder, overwrite, marker)  # somebody may have made it meanwhile
        stage.chmod(0o777 & ~_umask())  # mkdtemp makes folders private
        _put(stage, folder)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        hold.close()


def _put(stage: Path, folder: Path) -> None:
    """Give `stage` the name of `folder`; what had that name has `stage`'s then, or is gone."""
    if not folder.exists():
        stage.rename(folder)  # fails where somebody else's whole folder has come: neither is lost
    elif not _exchange(stage, folder):
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}{OLD}", dir=folder.parent))
        folder.rename(old / folder.name)
        stage.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    current, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(current, os.fsencode(one), current, os.fsencode(other), exchange) == 0


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, which ends with this process at the latest; no lock where the system has none."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _clear_leftovers(folder: Path) -> None:
    """Remove what runs left that were killed while they wrote `folder`; an old one caught midway gets its name back."""
    if sys.platform == "win32":
        return
    import fcntl

    for left in folder.parent.glob(f".{glob.escape(folder.name)}{OLD}*"):
        inside = left / folder.name
        if inside.is_dir() and not folder.exists():
            inside.rename(folder)
        if not inside.exists():
            shutil.rmtree(left, ignore_errors=True)
    for left in folder.parent.glob(f".{glob.escape(folder.name)}{PARTIAL}*"):
        with suppress(OSError):  # not ours, or just gone
            handle = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its run lives
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _unwritable(folder: Path, error: OSError) -> ArtifactError:
    if error.errno == errno.ENOTEMPTY:
        return ArtifactError(f"{folder} exists: another run made it meanwhile", hint="give --overwrite, or another -o")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ArtifactError(f"the disk of {folder} is full: nothing was written", hint="free some space and run again")
    return ArtifactError(f"cannot write {folder}: {error.strerror or error}", hint="give another -o")
