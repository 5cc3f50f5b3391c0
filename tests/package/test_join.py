"""What contributors are told: workflows, templates and pages parse, and every command, file and version they name is there."""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import deq_compile
from bench.__main__ import COMMANDS
from deq_compile import ready

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
YAML = [*WORKFLOWS, *sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ROOT / ".pre-commit-config.yaml"]
PAGES = [ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", ".github/pull_request_template.md", "docs/platforms.md")]
TEXTS = [*YAML, *PAGES]
ELSEWHERE = {"pip", "venv", "build", "twine"}  # modules that are Python's own, or that a workflow installs just before
LATER = {"build", "build/site", "dist"}  # made by a command


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def project() -> dict[str, Any]:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # the latter comes with pytest
    return toml.loads((ROOT / "pyproject.toml").read_text())  # type: ignore[no-any-return]


def loaded(path: Path) -> Any:
    """What YAML a file holds; the test is skipped where nothing can read it."""
    return pytest.importorskip("yaml").safe_load(path.read_text())


@pytest.mark.parametrize("path", YAML, ids=name_of)
def test_yaml_parses(path: Path) -> None:
    text = path.read_text()
    assert "\t" not in text
    found = loaded(path)
    assert isinstance(found, dict)
    if path in WORKFLOWS:
        assert {"name", "jobs", "permissions"} <= found.keys()
        for name, job in found["jobs"].items():
            assert job["timeout-minutes"] <= 120, name
            assert all(("uses" in step) != ("run" in step) for step in job["steps"]), name
    elif "ISSUE_TEMPLATE" in str(path) and path.name != "config.yml":
        assert {"name", "description", "body"} <= found.keys()
        labels = " ".join(part["attributes"]["description"] for part in found["body"])
        assert "explain(model)(*inputs)" in labels
        assert "python -m deq_compile" in labels


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands(text: str) -> list[str]:
    """What a text has people or machines run: `make …` and `python -m …`, up to the end of the line, the span or the command."""
    return re.findall(r"(?:make|python|Scripts.python) [^`\n|;]*", text)


def wrong_commands(text: str) -> list[str]:
    """Targets of make and modules of Python that are not there."""
    found = []
    for command in commands(text):
        if command.startswith("make "):
            words = command.split()[1:]
            goals = [w for w in words if re.fullmatch(r"[a-z-]+", w)]
            found += [f"make {goal}" for goal in goals if goal not in targets() and words[0] == goal]
        elif module := re.match(r"\S+ -m ([\w.]+)(?: ([a-z][a-z-]*))?", command):
            name, command_of_bench = module[1], module[2]
            if name not in ELSEWHERE and importlib.util.find_spec(name) is None:
                found.append(f"python -m {name}")
            if name == "bench" and command_of_bench and command_of_bench not in COMMANDS:
                found.append(f"python -m bench {command_of_bench}")
    return found


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_commands_are_there(path: Path) -> None:
    assert wrong_commands(path.read_text()) == []


def test_the_reader_of_commands_sees_wrong_ones() -> None:
    text = "run `make nothing`, then\n    python -m no_such_module --x\nand `python -m bench nonsense`; `make test` is one"
    assert wrong_commands(text) == ["make nothing", "python -m no_such_module", "python -m bench nonsense"]
    assert {"test", "demo", "lint", "typecheck", "docs"} <= targets()


def test_options_of_our_commands_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    """Those of `python -m deq_compile` and of `python -m bench`, wherever a text names them."""
    from bench.__main__ import main as bench
    from deq_compile.doctor import main as doctor

    def options(run: Any, *arguments: str) -> set[str]:
        with pytest.raises(SystemExit):
            run([*arguments, "--help"])
        return set(re.findall(r"--[a-z-]+", capsys.readouterr().out))

    asked = 0
    for path in TEXTS:
        for command in commands(path.read_text()):
            flags = set(re.findall(r"--[a-z-]+", command.partition("|")[0]))
            if "-m deq_compile" in command:
                assert flags <= options(doctor), command
                asked += len(flags)
            elif (found := re.search(r"-m bench ([a-z][a-z-]*)", command)) is not None:
                assert flags <= options(bench, found[1]), command
                asked += len(flags)
    assert asked >= 4


def paths(text: str) -> list[str]:
    """Files and folders that a text names in backticks, as a link, or to pytest."""
    spans = re.findall(r"`([\w./*-]+)`", text) + re.findall(r"\]\(([\w./-]+)\)", text)
    spans += re.findall(r"(?<![\w/])((?:tests|deq_compile|docs|hatch_build)[\w/]*(?:/|\.py|\.md))(?=[\s`]|$)", text, re.MULTILINE)
    looks = re.compile(r"^(?!https?:)(?:[\w.-]+/)+[\w.*-]*$|^[\w-]+\.(?:md|py|toml|txt|yml)$|^Makefile$")
    return [s for s in spans if looks.match(s) and "NAME" not in s]


def test_paths_are_there() -> None:
    seen = 0
    for path in TEXTS:
        for found in paths(path.read_text()):
            seen += 1
            if found not in LATER:
                places = [base / found for base in (ROOT, ROOT / "kernels" / "broyden", ROOT / ".github" / "workflows")]
                assert any(place.exists() for place in places), (name_of(path), found)
    assert seen > 40
    assert paths("see `no/such/file.py` or [x](docs/y.md), `word`") == ["no/such/file.py", "docs/y.md"]


def test_the_workflows_run_what_is_supported() -> None:
    """Their matrix is the tested versions of torch, and begins with the oldest Python; the classifiers say the same."""
    text = (ROOT / ".github/workflows/tests.yml").read_text()
    torches = re.search(r"torch: \[(.*)\]", text)
    pythons = re.search(r"python: \[(.*)\]", text)
    assert torches is not None
    assert pythons is not None
    assert tuple(re.findall(r'"([\d.]+)"', torches[1])) == ready.TESTED
    supported = [name.rpartition(" ")[2] for name in project()["project"]["classifiers"] if re.search(r":: 3\.\d+$", name)]
    tested = re.findall(r'"([\d.]+)"', pythons[1])
    assert (tested[0], tested[-1]) == (supported[0], supported[-1])
    assert project()["project"]["requires-python"] == f">={supported[0]}"
    assert project()["project"]["dependencies"] == [f"torch>={'.'.join(map(str, ready.OLDEST))}"]


def test_one_version() -> None:
    """In pyproject.toml, the package, the citation, and the newest section of the changelog, with its date."""
    version = project()["project"]["version"]
    assert deq_compile.__version__ == version
    citation = dict(re.findall(r"^(version|date-released): (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE))
    headings = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    assert headings[1] == (citation["version"], citation["date-released"]) == (version, citation["date-released"])


def test_the_address_is_named_in_one_place() -> None:
    """It is unknown as yet: whoever sets it, sets it there, and the release asks for it."""
    urls = project()["project"]["urls"]
    assert {"Homepage", "Documentation", "Changelog", "Issues"} <= urls.keys()
    bases = {"/".join(url.split("/")[:5]) for url in urls.values()}
    assert len(bases) == 1
    (base,) = bases
    named = [name_of(path) for path in (*TEXTS, ROOT / "README.md", ROOT / "CITATION.cff") if base in path.read_text()]
    assert named == []
    assert "/OWNER/" in (ROOT / ".github/workflows/release.yml").read_text()


def test_a_release_asks_before_it_publishes() -> None:
    release = loaded(ROOT / ".github/workflows/release.yml")
    steps = " ".join(str(step.get("run", "")) for step in release["jobs"]["build"]["steps"])
    assert release["jobs"]["publish"]["needs"] == "build"
    assert release["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    version = project()["project"]["version"]
    for script, expected in ((f'version = "{version}"', "pyproject.toml"), (f"## [{version}]", "CHANGELOG.md")):
        assert script in (ROOT / expected).read_text()
        assert expected in steps
    commands = [step["run"] for step in release["jobs"]["build"]["steps"] if "grep" in str(step.get("run"))]
    for tag, right in ((f"v{version}", True), ("v9.9.9", False)):
        codes = [subprocess.run(["bash", "-c", c], cwd=ROOT, env={"PATH": "/usr/bin:/bin", "GITHUB_REF_NAME": tag}).returncode
                 for c in commands[:2]]  # fmt: skip
        assert (codes == [0, 0]) == right, tag


def test_coverage_has_a_floor() -> None:
    assert 50 <= project()["tool"]["coverage"]["report"]["fail_under"] <= 100


def test_hooks_run_what_the_gate_runs() -> None:
    """The same calls of ruff and mypy as the Makefile's, and the check of the links."""
    gate = (ROOT / "Makefile").read_text().replace("$(RUN)", ".venv/bin/python")
    hooks = {hook["id"]: hook["entry"] for repo in loaded(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]}
    assert hooks.keys() == {"ruff-check", "ruff-format", "symlinks", "mypy"}
    for name in ("ruff-check", "ruff-format", "mypy"):
        assert f"\t{hooks[name]}\n" in gate
    assert hooks["symlinks"].split()[1] == "hatch_build.py"
