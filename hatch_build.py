"""Build hook: kernels and passes go into the package, whether or not the checkout has links to them.

``deq_compile/kernels`` and ``deq_compile/passes`` are committed relative symlinks to the top-level folders of the same
name, so that the wheel holds them inside the package and never as top-level packages (another distribution owns the
name ``kernels``). Git without symlink support writes a small text file in the place of each link: then the top-level
folders are taken. A wheel that would lack one is refused.

``python hatch_build.py`` says whether the links are as they have to be committed; the pre-commit hook runs it.
"""

from __future__ import annotations

import sys
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


class LinkHook(BuildHookInterface):  # type: ignore[type-arg]
    """Puts every linked folder into what is built; pyproject.toml leaves the links themselves out."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        for link, target in LINKS.items():
            folders = (root / link, (root / link).parent / target)
            found = next((folder.resolve() for folder in folders if folder.is_dir()), None)
            if found is None:
                raise RuntimeError(
                    f"cannot build deq_compile: {link} is not a directory, and neither is {folders[1].resolve()}.\n"
                    f"  expected: a relative symlink to {target} (or a directory with the same content)\n"
                    f"  got:      {describe(folders[0])}\n"
                    f"  fix:      git checkout -- {link} {folders[1].name}"
                )
            if version != "editable":  # that finds the folders where they are (deq_compile/ready.py)
                build_data["force_include"][str(found)] = link


def wrong_links(root: Path) -> list[str]:
    """What is wrong with the links of a checkout, a sentence each."""
    wrong = []
    for link, target in LINKS.items():
        path = root / link
        if not path.is_symlink() or path.readlink().as_posix() != target:
            wrong.append(f"{link}: expected a symlink to {target}. Fix: rm -rf {link} && ln -s {target} {link}")
    return wrong


if __name__ == "__main__":
    sys.exit("\n".join(wrong_links(Path(__file__).resolve().parent)) or 0)
