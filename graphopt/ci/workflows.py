"""What `graphopt ci init` writes: a workflow for GitHub Actions or GitLab, and a first graphopt.toml."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from graphopt.ci.plan import FILE
from graphopt.errors import DataError, SpecError
from graphopt.whole_files import write_whole

GITHUB = ".github/workflows/graphopt.yml"
GITLAB = ".gitlab/graphopt.yml"
GITLAB_ROOT = ".gitlab-ci.yml"
_TEMPLATES = Path(__file__).with_name("files")
_INCLUDE = f"include:\n  - local: {GITLAB}\n"
_PLAIN = re.compile(r"^[\w./-]+$")


def planned_files(
    folder: Path, models: Sequence[str], gitlab: bool, branch: str = "main", install: str = "pip install graphopt"
) -> dict[Path, str]:
    """Content by path of what a repository at `folder` lacks to be gated. Raises SpecError, DataError."""
    if not _PLAIN.match(branch):
        raise SpecError(f"branch {branch!r} cannot be written into a workflow")
    if "\n" in install or not install.strip():
        raise SpecError("--install must be one line")
    values = {"BRANCH": branch, "CONFIG": FILE, "INSTALL": json.dumps(install)}  # a JSON string is a YAML string
    name, place = ("gitlab.yml", GITLAB) if gitlab else ("github.yml", GITHUB)
    files = {folder / place: _filled((_TEMPLATES / name).read_text(encoding="utf-8"), values)}
    if gitlab and not (folder / GITLAB_ROOT).exists():
        files[folder / GITLAB_ROOT] = _INCLUDE
    if models or not (folder / FILE).exists():
        files[folder / FILE] = first_plan(folder, models)
    return files


def _filled(template: str, values: Mapping[str, str]) -> str:
    for key, value in values.items():
        template = template.replace(f"@{key}@", value)
    return template


def first_plan(folder: Path, models: Sequence[str]) -> str:
    """A plan of `models`, files below `folder`. Raises DataError: there is none such, or two of one name."""
    lines = [
        "# What `graphopt ci run` gates: docs/ci.md of graphopt.",
        "[ci]",
        'history = "latency.jsonl"',
        "threads = 1",
        "seconds = 60",
        "",
        "[ci.bounds]",
        'max-regression = "5%"',
        'max-size = "10%"',
    ]
    names: list[str] = []
    for model in models:
        file = Path(model).absolute()
        if not file.is_file() or not file.is_relative_to(folder.absolute()):
            raise DataError(f"no such model in {folder}: {model}", hint="give ONNX files of this repository")
        name = re.sub(r"[^\w-]+", "-", file.stem).strip("-") or "model"
        if name in names:
            raise DataError(f"two models would be called {name}", hint="add them to graphopt.toml by hand")
        names.append(name)
        inside = file.relative_to(folder.absolute()).as_posix()
        lines += ["", f"[models.{name}]", f"model = {json.dumps(inside, ensure_ascii=False)}"]
        lines += ['targets = ["cpu{mcpu=x86-64-v3}"]']
    if not names:
        lines += ["", "# [models.NAME]", '# model = "model.onnx"', '# targets = ["cpu{mcpu=x86-64-v3}"]']
    return "\n".join(lines) + "\n"


def write_files(files: Mapping[Path, str], force: bool) -> None:
    """Write all, or nothing where one exists with another content and `force` does not say to replace it.

    Raises DataError.
    """
    taken = [path for path, text in files.items() if path.exists() and _content(path) != text]
    if taken and not force:
        raise DataError(
            f"{', '.join(map(str, taken))} exists already: nothing was written", hint="give --force to replace it"
        )
    for path, text in files.items():
        write_whole(path, text)


def _content(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
