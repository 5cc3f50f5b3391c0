"""What keeps the house one that strangers can carry on: short functions, files of a size, imports that run one way."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES_OF_A_FUNCTION, MOST_LINES_OF_A_FILE = 60, 400
LONG_FILES: set[str] = set()  # that are too long still: may only shrink
# The layers of the package, from the top: a module imports from its own layer and from those below it.
LAYERS = (
    ("deq_compile/__init__", "deq_compile/__main__", "deq_compile/doctor", "deq_compile/testing", "deq_compile/watch"),
    ("deq_compile/api",),
    ("deq_compile/backend", "deq_compile/caches", "deq_compile/exporting", "deq_compile/onlooker"),
    ("deq_compile/rewrite", "deq_compile/as_written", "deq_compile/undecided"),
    ("deq_compile/capture", "deq_compile/lower"),
    ("deq_compile/passes", "deq_compile/families"),
    ("deq_compile/scope", "deq_compile/inner", "deq_compile/markers"),
    ("deq_compile/explicit",),
    ("deq_compile/regularise", "deq_compile/report", "deq_compile/report_html", "deq_compile/solve_info", "deq_compile/structure",
     "deq_compile/unexpected", "deq_compile/region"),
    ("deq_compile/config", "deq_compile/kernels"),
    ("deq_compile/absent", "deq_compile/compiling", "deq_compile/fsdp_parts", "deq_compile/option_rules", "deq_compile/ready",
     "deq_compile/registry", "deq_compile/torch_parts"),
)  # fmt: skip
# The same among the kernels: solvers know the factors of Broyden's, all know the iteration, nobody knows the solvers.
KERNELS = (("gcr",), ("reuse",), ("anderson", "picard"), ("broyden",), ("iteration", "recycle"),
           ("ahead", "native", "remembered", "tiles", "tuned", "workspace", "folder", "device", "triton_shared"))  # fmt: skip


def sources() -> list[str]:
    """Every Python file of the project, by its path from the root; those of links once."""
    folders = ("deq_compile", "kernels", "passes", "bench", "examples", "tests")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    names = {str(path.relative_to(ROOT)) for path in found}
    return sorted(n for n in names if not n.startswith(("deq_compile/kernels/", "deq_compile/passes/")))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_functions_fit_on_a_screen() -> None:
    """Outside Triton, where a kernel is one function."""
    long = []
    for name in sources():
        if Path(name).name.startswith("triton_"):
            continue
        for function in functions(ast.parse((ROOT / name).read_text())):
            lines = (function.end_lineno or 0) - function.lineno + 1
            if lines > MOST_LINES_OF_A_FUNCTION:
                long.append(f"{name}: {function.name}, {lines} lines")
    assert not long


def test_files_are_of_a_size() -> None:
    long = {name for name in sources() if len((ROOT / name).read_text().splitlines()) > MOST_LINES_OF_A_FILE}
    assert long <= LONG_FILES, "split these"
    assert long == LONG_FILES, "take these off the list"


def imports(name: str) -> Iterator[str]:
    """Modules of the package that a file imports when it is imported, as paths; not what only a type checker or a call needs."""
    tree = ast.parse((ROOT / name).read_text())
    package = name.replace("kernels/", "deq_compile/kernels/", 1) if name.startswith("kernels/") else name
    package = package.replace("passes/", "deq_compile/passes/", 1) if package.startswith("passes/") else package
    parts = package.removesuffix(".py").split("/")
    checked = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    apart = {inner for node in (*checked, *functions(tree)) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if node in apart:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.replace(".", "/") for alias in node.names if alias.name.startswith("deq_compile"))
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level] if node.level else []
            where = [*base, *(node.module.split(".") if node.module else [])]
            if where and where[0] == "deq_compile":
                for alias in node.names:
                    inner = "/".join([*where, alias.name])
                    deeper = (ROOT / f"{inner}.py").exists() or (ROOT / inner).is_dir()
                    yield inner if deeper else "/".join(where)


def layer_of(name: str, layers: tuple[tuple[str, ...], ...], root: str = "") -> int | None:
    for number, members in enumerate(layers):
        if any(name == root + member or name.startswith(root + member + "/") for member in members):
            return number
    return None


def upward(files: list[str], layers: tuple[tuple[str, ...], ...], root: str = "") -> list[str]:
    """Imports that go from a layer to one above it."""
    found = []
    for name in files:
        own = name.removesuffix(".py").removesuffix("/__init__") if name != "deq_compile/__init__.py" else "deq_compile/__init__"
        own = f"deq_compile/{own}" if own.startswith(("kernels", "passes")) else own
        mine = layer_of(own, layers, root)
        for other in imports(name):
            theirs = layer_of("deq_compile/__init__" if other == "deq_compile" else other, layers, root)
            if mine is not None and theirs is not None and theirs < mine:
                found.append(f"{name} imports {other}")
    return found


def test_imports_run_one_way() -> None:
    package = [name for name in sources() if name.startswith(("deq_compile", "kernels", "passes"))]
    unknown = [n for n in package if n.startswith("deq_compile/") and layer_of(n.removesuffix(".py"), LAYERS) is None]
    assert not unknown, "say which layer these are in"
    assert upward(package, LAYERS) == []
    assert upward([n for n in package if n.startswith("kernels/")], KERNELS, "deq_compile/kernels/") == []


def test_the_reader_of_imports_sees_them() -> None:
    assert "deq_compile/region/run" in set(imports("deq_compile/region/op.py")) | set(imports("deq_compile/region/eager.py"))
    assert "deq_compile/kernels/iteration" in set(imports("kernels/broyden/state.py"))
    wrong = (("deq_compile/kernels",), ("deq_compile/region",))
    assert upward(["deq_compile/region/forward.py"], wrong)


@pytest.mark.parametrize("name", ["SOLVERS", "BACKWARDS"])
def test_no_name_of_a_solver_or_a_backward_outside_its_file(name: str) -> None:
    """Who asks for one by a string has to be found by whoever adds another."""
    import deq_compile.region.run  # noqa: F401, registers all
    from deq_compile import registry

    own = {"SOLVERS": "region/solvers/", "BACKWARDS": "region/backwards/"}[name]
    names = set(getattr(registry, name).names()) - {"auto"}  # that is a choice of other options too
    found = []
    for path in sources():
        if own in path or not path.startswith(("deq_compile", "kernels", "passes")):
            continue
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.Compare):
                sides = [part for side in (node.left, *node.comparators) for part in getattr(side, "elts", [side])]
                if names & {side.value for side in sides if isinstance(side, ast.Constant)}:
                    found.append(f"{path}:{node.lineno} {ast.unparse(node)}")
    assert not found


def test_bench_and_examples_come_in_by_the_door() -> None:
    """By public names and `deq_compile.testing`, as a benchmark of somebody else's would."""
    found = []
    for path in sources():
        if path.startswith(("bench/", "examples/")):
            for node in ast.walk(ast.parse((ROOT / path).read_text())):
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                public = ("deq_compile.testing", "deq_compile.watch")
                inner = [m for m in modules if m.startswith("deq_compile.") and m not in public]
                found += [f"{path}:{node.lineno} {m}" for m in inner]
    assert not found


def test_the_door_leads_somewhere() -> None:
    from deq_compile import testing

    for name in set(testing._WHERE):
        if not name.endswith("_triton") and name not in ("set_conditional",):
            assert getattr(testing, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = testing.nothing
