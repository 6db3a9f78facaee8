from __future__ import annotations

import pytest

from graphopt.errors import ArtifactError
from graphopt.output_folder import staged
from graphopt.runtime.artifact import MANIFEST


def _write(path, overwrite=False, text="{}"):
    with staged(path, overwrite) as folder:
        (folder / MANIFEST).write_text(text)


def test_nothing_is_left_when_the_block_fails(tmp_path):
    with pytest.raises(RuntimeError), staged(tmp_path / "out", False) as folder:
        (folder / MANIFEST).write_text("{}")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_when_the_user_interrupts(tmp_path):
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "out", False):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_an_existing_artifact_is_replaced_only_when_asked(tmp_path):
    _write(tmp_path / "out", text="1")
    with pytest.raises(ArtifactError, match="--overwrite"):
        _write(tmp_path / "out", text="2")
    _write(tmp_path / "out", overwrite=True, text="3")
    assert (tmp_path / "out" / MANIFEST).read_text() == "3"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failed_overwrite_keeps_the_old_artifact(tmp_path):
    _write(tmp_path / "out", text="1")
    with pytest.raises(RuntimeError), staged(tmp_path / "out", True):
        raise RuntimeError
    assert (tmp_path / "out" / MANIFEST).read_text() == "1"


def test_a_folder_that_is_no_artifact_is_never_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("x")
    with pytest.raises(ArtifactError, match="not an artifact"):
        _write(tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_a_file_or_a_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError):
        _write(tmp_path / "file", overwrite=True)
    with pytest.raises(ArtifactError, match="cannot write"):
        _write(tmp_path / "file" / "out")


def test_a_full_disk_is_one_clear_line():
    import errno

    from graphopt.output_folder import _unwritable

    error = _unwritable(__import__("pathlib").Path("/x"), OSError(errno.ENOSPC, "No space left on device"))
    assert "full" in str(error)
    assert "nothing was written" in str(error)
