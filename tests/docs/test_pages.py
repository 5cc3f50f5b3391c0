"""README and site: figures come from committed results, blocks run, links lead somewhere, the site builds without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.figures import blocks, options, render, sources
from deq_compile.option_rules import RULES

ROOT = sources.ROOT
TEXTS = [render.README_SOURCE, *render.pages()]
CONSOLE = re.compile(r"```console\n(.*?)```", re.S)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
# Prose must not state what was measured: digits with a unit of time, size, share or speed.
MEASURED = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:[–-]\d+(?:\.\d+)?)?\s?(?:×|%|ms|µs|us|MB|GB|GFlop|times|seconds|s\b)")
ALLOWED = {"2 to 4 minutes", "1 MB"}  # settings of a command, not results


def identity(path: Path) -> str:
    return render.name_of(path)


@pytest.fixture
def quickly() -> Iterator[None]:
    """Bodies and the rest of a model uncompiled: what blocks say does not depend on it, and Inductor takes seconds a graph."""
    before, RULES["inner"].default = RULES["inner"].default, "eager"
    torch.manual_seed(0)
    with warnings.catch_warnings():
        yield
    RULES["inner"].default = before


def test_the_readme_is_what_its_source_gives() -> None:
    """Fix: python -m bench figures."""
    assert render.README.read_text() == render.readme()


def test_the_readme_fits_on_two_screens() -> None:
    assert 80 <= len(render.README.read_text().splitlines()) <= 100


@pytest.mark.parametrize("page", TEXTS, ids=identity)
def test_blocks_run_and_print_what_the_page_shows(page: Path, quickly: None) -> None:
    """All blocks of a page, in order; numbers in what they print may differ. Fix: python -m bench figures --run."""
    text = page.read_text()
    missing = {module for block in blocks.of(text) for module in block.missing()}
    printed = blocks.run(page, text)
    scripts = {f"examples/{name}" for name in render.SCRIPTS}
    shown = {name.split("/", 1)[1] for name in re.findall(r'printed\("([^"]+)"\)', text) if name not in scripts}
    assert shown <= set(printed) or missing
    for name in shown & set(printed):
        committed = render.printed(f"{identity(page)}/{name}").removeprefix("```text\n").removesuffix("\n```")
        assert blocks.shape(printed[name]) == blocks.shape(committed), name
    if missing:
        pytest.skip(f"not installed: {', '.join(sorted(missing))}")


@pytest.mark.parametrize("page", TEXTS, ids=identity)
def test_no_measurement_is_typed_by_hand(page: Path) -> None:
    prose = re.sub(r"```.*?```|`[^`]*`|\{\{.*?\}\}|\{%.*?%\}|<!--.*?-->", "", page.read_text(), flags=re.S)
    for allowed in ALLOWED:
        prose = prose.replace(allowed, "")
    assert MEASURED.findall(prose) == []


def test_typed_measurements_would_be_seen() -> None:
    for text in ("5.6× as fast", "12 ms a step", "saves 18 %", "runs 3 times", "0.5 s later", "about 40 MB"):
        assert MEASURED.search(text), text


@pytest.mark.parametrize("page", [render.README, *render.pages()], ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    """To files that a clone has: what git ignores is not in one."""
    for match in LINK.finditer(page.read_text()):
        target = match["target"].split("#")[0]
        if target and not target.startswith(("http", "mailto:")) and "{{" not in target:
            assert (page.parent / target).exists(), match[0]
            ignored = subprocess.run(["git", "check-ignore", "-q", target], cwd=page.parent, check=False).returncode == 0
            assert not ignored, match[0]


@pytest.mark.parametrize("page", TEXTS, ids=identity)
def test_commands_of_the_pages_exist(page: Path) -> None:
    """Each `make` target, `python -m` module and `bench` command that a page names."""
    text = page.read_text()
    targets = set(re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[0].split())
    assert set(re.findall(r"\bmake ([a-z-]+)`", text)) <= targets
    from bench.__main__ import COMMANDS

    assert set(re.findall(r"python -m bench ([a-z][a-z-]*)", text)) <= set(COMMANDS)
    for console in CONSOLE.findall(text):
        for line in console.splitlines():
            command = line.removeprefix("$ ").split()
            if line.startswith("$ make "):
                assert command[1] in targets, line


def test_all_options_are_explained() -> None:
    table = options.table()
    for name, rule in RULES.items():
        assert f"`{name}`" in table
        default = options.meanings()[name][0]
        if isinstance(rule.default, int | float) and not isinstance(rule.default, bool):
            assert float(default) == rule.default, name
        elif isinstance(rule.default, str):
            assert default == f'"{rule.default}"', name


def test_a_figure_that_there_is_not_is_an_error() -> None:
    with pytest.raises(FileNotFoundError, match=r"expected one of .*; got 'nothing'"):
        render.fill('{{ results.conditions("nothing") }}')
    with pytest.raises(KeyError, match="bench figures --run"):
        render.fill('{{ printed("nothing/here") }}')


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for module in ("sphinx", "myst_nb", "furo", "sphinx_copybutton"):
        pytest.importorskip(module, reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path / "trees")]
    command += [str(ROOT / "docs"), str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    pages = {path.stem for path in (tmp_path / "site").glob("*.html")}
    raw = [path.name for path in (tmp_path / "site").glob("*.html") if re.search(r"\$\$|\$[^$\n<]*\\(top|bar)", path.read_text())]
    assert raw == [], "mathematics that is not set"
    assert {identity(page) for page in render.pages()} <= pages
