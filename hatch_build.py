"""Build hook: refuse to build a wheel that would lack its kernels and passes.

``deq_compile/kernels`` and ``deq_compile/passes`` are committed relative symlinks to the top-level folders of the same
name, so that the wheel holds them inside the package and never as top-level packages (another distribution owns the
name ``kernels``). Git without symlink support writes a small text file in the place of each link; the package built
from such a checkout could not be imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LINKS = {"deq_compile/kernels": "../kernels", "deq_compile/passes": "../passes"}


def describe(path: Path) -> str:
    """Say what stands at ``path``, for the error message."""
    if path.is_symlink():
        return f"a symlink to '{path.readlink()}', which does not exist"
    if not path.exists():
        return "nothing"
    if path.is_file():
        return f"a file of {path.stat().st_size} bytes (a checkout made without symlink support writes one)"
    return "neither a file nor a directory"


class LinkCheckHook(BuildHookInterface):  # type: ignore[type-arg]
    """Fails the build unless every linked folder is a directory."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        for link, target in LINKS.items():
            path = Path(self.root) / link
            if path.is_dir():
                continue
            raise RuntimeError(
                f"cannot build deq_compile: {link} is not a directory.\n"
                f"  expected: a relative symlink to {target} (or a directory with the same content)\n"
                f"  got:      {describe(path)}\n"
                f"  fix:      git config core.symlinks true && git checkout -- {link}\n"
                f"            or, without git: rm -f {link} && ln -s {target} {link}"
            )
