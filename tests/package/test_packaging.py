"""The wheel holds kernels and passes inside the package, no other wheel is built, and nobody imports the bare names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINKS = ("kernels", "passes")
SOURCES = ("deq_compile", "kernels", "passes", "pyproject.toml", "hatch_build.py", "LICENSE", "README.md")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the build reads, links kept as links."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, copy / name)
    return copy


def build(tree: Path, target: str = "wheel") -> subprocess.CompletedProcess[str]:
    """Build into ``tree/dist`` with the hatchling of this environment; no network."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", "dist"]
    # PYTHONPATH would put a checkout before the installed tools; CI systems set it.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=60)


def test_wheel_holds_the_linked_folders_inside_the_package(tree: Path) -> None:
    result = build(tree)
    assert result.returncode == 0, result.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    for folder in LINKS:
        expected = {f"deq_compile/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob("*.py")}
        assert expected, f"{folder} is empty"
        assert expected <= names
    assert "deq_compile/py.typed" in names
    top_level = {name.split("/")[0] for name in names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"deq_compile"}
    assert "[torch_dynamo_backends]\ndeq = deq_compile.backend:deq" in entry_points
    assert "License-Expression: Apache-2.0" in metadata


def test_sources_other_than_python_reach_the_wheel(tree: Path) -> None:
    (tree / "kernels" / "probe.cpp").write_text("int probe;\n")  # the C++ step is compiled from such a file at run time
    assert build(tree).returncode == 0
    (wheel,) = (tree / "dist").glob("*.whl")
    assert "deq_compile/kernels/probe.cpp" in zipfile.ZipFile(wheel).namelist()


def without_symlinks(tree: Path) -> None:
    """What git writes with core.symlinks=false, as on Windows: a text file in the place of each link."""
    for folder in LINKS:
        link = tree / "deq_compile" / folder
        link.unlink()
        link.write_text(f"../{folder}")


@pytest.mark.parametrize("target", ["wheel", "sdist"])
def test_a_checkout_without_symlinks_builds_the_same(tree: Path, target: str) -> None:
    """A wheel from it, and from its source distribution too."""
    names = []
    for _ in range(2):
        assert build(tree, "wheel").returncode == 0
        (wheel,) = (tree / "dist").glob("*.whl")
        names.append(sorted(zipfile.ZipFile(wheel).namelist()))
        wheel.unlink()
        if len(names) == 1:
            without_symlinks(tree)
            if target == "sdist":
                assert build(tree, "sdist").returncode == 0
                (source,) = (tree / "dist").glob("*.tar.gz")
                with tarfile.open(source) as archive:
                    archive.extractall(tree.parent, filter="data")
                tree = tree.parent / source.name.removesuffix(".tar.gz")
    assert names[0] == names[1]
    assert "deq_compile/kernels/native.py" in names[0]


def test_a_checkout_without_symlinks_can_be_imported_in_place(tree: Path) -> None:
    without_symlinks(tree)
    code = "import deq_compile; from deq_compile import kernels; from deq_compile.passes import judge; print(kernels.__file__)"
    env = {**os.environ, "PYTHONPATH": str(tree), "DEQ_COMPILE_NATIVE": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == tree / "kernels" / "__init__.py"


def test_build_fails_where_a_folder_is_missing(tree: Path) -> None:
    shutil.rmtree(tree / "kernels")
    result = build(tree)
    assert result.returncode != 0
    assert "got:      a symlink to '../kernels', which does not exist" in result.stderr
    without_symlinks(tree)
    result = build(tree)
    assert result.returncode != 0
    assert "got:      a file of 10 bytes (a checkout made without symlink support writes one)" in result.stderr
    assert not list(tree.glob("dist/*.whl"))


def test_what_is_committed_are_links() -> None:
    import hatch_build

    assert hatch_build.wrong_links(ROOT) == []


def test_a_link_that_is_a_file_is_told(tree: Path) -> None:
    import hatch_build

    without_symlinks(tree)
    assert [line.partition(":")[0] for line in hatch_build.wrong_links(tree)] == [f"deq_compile/{name}" for name in LINKS]


@pytest.mark.parametrize("folder", LINKS)
def test_links_are_relative(folder: str) -> None:
    assert os.readlink(ROOT / "deq_compile" / folder) == f"../{folder}"


FORMS = ("import {0}\n", "import {0}.base\n", "from {0} import base\n")
BANNED = [form.format(name) for name in LINKS for form in FORMS]


def ruff(filename: str, source: str) -> str:
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise", "--select=TID251"]
    command += ["--stdin-filename", filename, "-"]
    return subprocess.run(command, cwd=ROOT, input=source, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.parametrize("folder", ["deq_compile", "deq_compile/kernels", "deq_compile/passes", "bench", "tests"])
def test_lint_bans_the_top_level_names(folder: str) -> None:
    report = ruff(f"{folder}/x.py", "".join(BANNED))
    assert report.count("TID251") == len(BANNED), report


def test_lint_lets_the_package_names_pass() -> None:
    source = "from . import base\nfrom .broyden import reference\nfrom deq_compile import kernels\n"
    for filename in ("deq_compile/kernels/x.py", "deq_compile/passes/x.py", "deq_compile/x.py"):
        assert "TID251" not in ruff(filename, source)
