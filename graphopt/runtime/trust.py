"""Whether a compiled library may be loaded: it is code that runs with its user's rights.

Digests in the manifest say that an artifact is whole, not who made it. So `graphopt optimize` signs the manifest with a
key that it keeps for each user (HMAC-SHA256, RFC 2104), and an artifact whose signature fits was built with that key:
it loads wherever it lies. Any other needs its user's word, `--trust` or `trust=True`. Machines that share a secret in
$GRAPHOPT_TRUST_KEY, such as the jobs of one CI, trust each other's artifacts.

The key lies in $GRAPHOPT_CONFIG, else $XDG_CONFIG_HOME/graphopt, else ~/.config/graphopt, for its owner's eyes only.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
import tempfile
from pathlib import Path

from graphopt.errors import ArtifactError

SIGNATURE = "manifest.sig"
SECRET = "GRAPHOPT_TRUST_KEY"
KEY_BYTES = 32
WHY = (
    "a compiled library is code that runs with your rights: give --trust (in Python trust=True) if you trust its maker"
)


class NoKeyError(Exception):
    """Why there is no key to sign or check with."""


def key_path() -> Path:
    """The file of this user's key."""
    own = os.environ.get("GRAPHOPT_CONFIG")
    if own:
        return Path(own) / "trust.key"
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "graphopt" / "trust.key"


def sign(folder: Path, manifest: bytes) -> bool:
    """Write the signature of an artifact's manifest; without a key (the home cannot be written) there is none."""
    try:
        key = _key(make=True)
    except NoKeyError:
        return False
    (folder / SIGNATURE).write_text(_mac(key, manifest) + "\n", encoding="ascii")
    return True


def require(folder: Path, manifest: bytes, trust: bool) -> None:
    """Raises ArtifactError unless the manifest was signed with this user's key, or `trust` is given."""
    if trust:
        return
    try:
        signature = (folder / SIGNATURE).read_bytes()[:200].strip()
        reason = "" if hmac.compare_digest(signature, _mac(_key(make=False), manifest).encode()) else "by another key"
    except OSError:
        reason = "unsigned"
    except NoKeyError as error:
        reason = str(error)
    if reason:
        raise ArtifactError(f"{folder} holds a compiled library that you did not build here ({reason})", hint=WHY)


def _mac(key: bytes, manifest: bytes) -> str:
    return hmac.new(key, manifest, hashlib.sha256).hexdigest()


def _key(make: bool) -> bytes:
    shared = os.environ.get(SECRET)
    if shared:
        return hashlib.sha256(b"graphopt artifacts\0" + shared.encode("utf-8", "surrogateescape")).digest()
    path = key_path()
    try:
        if make and not path.exists():
            _make(path)
        return _read(path)
    except FileNotFoundError:
        raise NoKeyError("you have no key yet") from None
    except OSError as error:
        raise NoKeyError(f"your key {path} cannot be used: {error.strerror or error}") from error


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise NoKeyError(f"your key {path} is open to others: chmod 600 it if only you had it, else remove it")
        key = file.read(KEY_BYTES + 1)
    if len(key) != KEY_BYTES:
        raise NoKeyError(f"your key {path} is damaged: remove it, the next artifact makes a new one")
    return key


def _make(path: Path) -> None:
    """Whole or not at all, and only once: of two processes that make it at once, one wins for both."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".trust-")  # mkstemp: mode 600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
    finally:
        os.unlink(name)
