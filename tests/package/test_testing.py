"""`deq_compile.testing`, the the door to the inside: one answer for type checkers, callers, and tests that replace."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

import pytest

from deq_compile import testing
from tests.fresh import python


def declared() -> dict[str, tuple[str, str]]:
    """What a type checker is told: for each name where a from-import takes it, and what it is called there."""
    (block,) = (node for node in ast.parse(Path(testing.__file__).read_text()).body if isinstance(node, ast.If))
    found = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        found.update({alias.asname or alias.name: (node.module or "", alias.name) for alias in node.names})
    return found


DECLARED = declared()


def test_a_type_checker_knows_every_name() -> None:
    assert set(DECLARED) == set(testing._WHERE) == set(testing.__all__)


@pytest.mark.parametrize("name", DECLARED)
def test_a_name_is_what_a_type_checker_takes_it_for(name: str) -> None:
    """A package's function may have the name of its submodule, and a from-import prefers the function."""
    if name.endswith("_triton") or name == "set_conditional":
        pytest.importorskip("triton")
    place, inside = DECLARED[name]
    found = getattr(testing, name)  # imports the module, where it is one
    assert found is getattr(importlib.import_module(place), inside)


def test_a_replacement_in_its_module_is_seen_and_does_not_stay() -> None:
    from deq_compile.kernels import tiles

    door: Any = testing  # for a type checker `len` cannot be what stands there
    original = door.power_of_two
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "power_of_two", len)
        assert door.power_of_two is len
    assert door.power_of_two is original


def test_the_door_is_not_imported_with_the_package_and_imports_nothing() -> None:
    code = "import sys, deq_compile; a = 'deq_compile.testing' in sys.modules; b = set(sys.modules); import deq_compile.testing\n"
    code += "print(a, sorted(set(sys.modules) - b))"
    done = python(code, "torch")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False ['deq_compile.testing']"
