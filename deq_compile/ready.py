"""What has to be there before anything else of the package can be imported: a torch that is new enough, and the linked folders.

`deq_compile/kernels` and `deq_compile/passes` are links to the folders of the same name beside the package. A checkout without
symlinks (git on Windows, as it comes) has a small text file in the place of each: the folders are then found where they are.
"""

from __future__ import annotations

import re
import sys
from collections.abc import MutableSequence
from pathlib import Path

OLDEST = (2, 11)  # of torch
TESTED = ("2.11", "2.13", "2.14")  # versions of torch that the whole suite is run on
LINKED = ("kernels", "passes")


def version_of(text: str) -> tuple[int, int]:
    """Major and minor of a version such as "2.13.0a0+git12ab"; (0, 0) where it does not begin with two numbers."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def check_torch() -> None:
    """
    Raises:
        ImportError: torch is not installed, or older than `OLDEST`; the message says what to do.
    """
    wanted = ".".join(map(str, OLDEST))
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            f"deq_compile: expected torch {wanted} or newer, got none. Fix: pip install 'torch>={wanted}'"
        ) from None
    if version_of(str(torch.__version__)) < OLDEST:
        raise ImportError(
            f"deq_compile: expected torch {wanted} or newer, got torch {torch.__version__}. Fix: pip install -U 'torch>={wanted}'"
        )


def find_linked(package: Path, path: MutableSequence[str]) -> None:
    """Let the linked folders be found beside the package where a checkout has no links.

    Args:
        package: the folder of the package.
        path: where its modules are looked for; the folder above is added to it if need be.

    Raises:
        ImportError: a folder is neither there nor beside the package; the message says what to do.
    """
    for name in LINKED:
        if (package / name).is_dir():
            continue
        if not (package.parent / name / "__init__.py").is_file():
            raise ImportError(
                f"deq_compile: expected a folder {package / name}, or one at {package.parent / name}; got neither. "
                "Fix: pip install . in the whole checkout, or git checkout -- deq_compile kernels passes"
            )
        if str(package.parent) not in path:
            path.append(str(package.parent))


check_torch()
find_linked(Path(__file__).resolve().parent, sys.modules[__package__].__path__)
