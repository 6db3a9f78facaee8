from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from graphopt.errors import SpecError
from graphopt.plugins import parse_target, pass_class, pass_names, target_names


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on sys.path with an installed package `acme` that adds a pass; returns its path."""
    (tmp_path / "acme.py").write_text(
        textwrap.dedent(
            '''
            """y = x"""
            import graphopt

            class DropIdentity(graphopt.Pass):
                """Drops Identity nodes."""

                fidelity = graphopt.Fidelity.EXACT
                limit: int = 10

                def run(self, model, context):
                    found = [n for n in model.graph if n.op_type == "Identity"][: self.limit]
                    for node in found:
                        node.outputs[0].replace_all_uses_with(node.inputs[0])
                        model.graph.remove(node, safe=True)
                    return graphopt.PassResult(model, len(found))

            NotAPass = 3
            '''
        )
    )
    info = tmp_path / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[graphopt.passes]\ndrop-identity = acme:DropIdentity\nbroken = acme:Missing\nodd = acme:NotAPass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_pass_of_another_package_is_found_by_entry_point(site):
    assert "drop-identity" in pass_names()
    assert pass_class("drop-identity").name == "drop-identity"


def test_a_broken_plugin_is_named_only_when_it_is_asked_for(site):
    assert "broken" in pass_names()
    with pytest.raises(SpecError, match="acme:Missing"):
        pass_class("broken")
    with pytest.raises(SpecError, match=r"not a graphopt\.Pass"):
        pass_class("odd")


def test_the_command_line_lists_and_explains_it(site):
    import os

    env = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "graphopt.cli"]
    listed = subprocess.run([*command, "passes"], env=env, capture_output=True, text=True, check=True)
    assert "drop-identity" in listed.stdout
    assert "limit=10" in listed.stdout
    explained = subprocess.run(
        [*command, "explain", "drop-identity"], env=env, capture_output=True, text=True, check=True
    )
    assert "y = x" in explained.stdout


def test_targets_parse_and_print():
    assert "cpu" in target_names()
    assert str(parse_target("cpu{mcpu=cascadelake,threads=1}")) == "cpu{mcpu=cascadelake,threads=1}"
