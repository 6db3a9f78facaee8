"""One case: a model of the corpus, mutated several times, sometimes with its bytes damaged, in a folder with traps."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import onnx
from google.protobuf.message import DecodeError

from tests.fuzz.corpus import corpus
from tests.fuzz.mutations import MUTATIONS


def make_case(seed: int, number: int, folder: Path) -> tuple[Path, str]:
    """Write case `number` of `seed`, always the same, into `folder`; returns the file and what was done."""
    rng = Random(f"{seed}/{number}")
    name = rng.choice(sorted(corpus()))
    model = onnx.load_model_from_string(corpus()[name])
    done = [name]
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5))):
        mutation = rng.choice(MUTATIONS)
        done.append(mutation.__name__)
        try:
            mutation(model, rng)
        except DecodeError:
            done.append("(too deep)")  # protobuf itself refuses to nest it further
    content = bytearray(model.SerializeToString())
    if rng.random() < 0.15:
        done.append(_damage(content, rng))
    _surroundings(folder)
    path = folder / "model.onnx"
    path.write_bytes(content)
    return path, " ".join(done)


def _damage(content: bytearray, rng: Random) -> str:
    how = rng.randrange(4)
    if not content:
        return "empty"
    if how == 0:
        del content[rng.randrange(len(content)) :]
        return "truncated"
    if how == 1:
        for _ in range(rng.choice((1, 3, 20))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        return "bytes changed"
    if how == 2:
        at = rng.randrange(len(content))
        content[at:at] = rng.randbytes(rng.choice((1, 4, 100)))
        return "bytes inserted"
    content += content[rng.randrange(len(content)) :]
    return "bytes repeated"


def _surroundings(folder: Path) -> None:
    """What a location of external data may point at; the secret lies outside."""
    secret = folder.parent / "secret"
    if secret.exists() and (folder / "hard").exists():
        return
    secret.write_bytes(b"\x3f\x80\x00\x00" * 1024)
    (folder / "data").write_bytes(b"\x00\x00\x80\x3f" * 1024)
    (folder / "folder").mkdir()
    (folder / "link").symlink_to(secret)
    (folder / "linked").symlink_to(folder.parent)
    os.link(secret, folder / "hard")
    os.mkfifo(folder / "fifo")
