"""Where compiled C++ is kept: in a folder that nobody but this user, or root, can write to.

Whoever can write to the folder that a library is loaded from runs code as the one who loads it. Inductor's own cache is a folder
under /tmp whose name is known beforehand, and it belongs to whoever made it first.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

VARIABLE = "DEQ_COMPILE_CACHE_DIR"
_INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"


def _user() -> int | None:
    """Who we are; None where files have no owners."""
    return os.geteuid() if hasattr(os, "geteuid") else None


def distrusted(folder: Path) -> str:
    """Why others might put something into a folder, or "" where they cannot: the folder belongs to this user, only it may write
    there, and nobody else can put another in its place."""
    user = _user()
    if user is None:
        return ""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        return f"{folder} is no folder"
    if found.st_uid != user:
        return f"{folder} belongs to user {found.st_uid}"
    if found.st_mode & 0o022:
        return f"others may write to {folder} (mode {stat.S_IMODE(found.st_mode):o})"
    # Inside of a container the system's files may belong to a user that stands for all who are not known there.
    trusted = {user, 0, Path("/").stat().st_uid}
    for above in folder.resolve().parents:
        facts = above.stat()
        if facts.st_uid not in trusted:
            return f"{above} belongs to user {facts.st_uid}"
        # A user's own first group is mostly a group of one, and its folders may be made with mode 775.
        others = 0o002 if facts.st_uid == user and facts.st_gid == os.getegid() else 0o022
        if facts.st_mode & others and not facts.st_mode & stat.S_ISVTX:
            return f"others may write to {above} (mode {stat.S_IMODE(facts.st_mode):o})"
    return ""


def private() -> Path:
    """The folder for this user's compiled code: $DEQ_COMPILE_CACHE_DIR; else Inductor's cache, a folder in it, or one in
    ~/.cache, the first that belongs to this user alone. It is made with mode 700 if need be.

    Raises:
        PermissionError: others might write to all of them; the message says how to name another.
    """
    reasons = []
    for folder in _candidates():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            reason = distrusted(folder)
        except OSError as error:
            reason = str(error)
        if not reason:
            return folder
        reasons.append(reason)
    raise PermissionError(f"{'; '.join(reasons)}. Fix: set {VARIABLE} to a folder that belongs to you, with mode 700")


def _candidates() -> Iterator[Path]:
    named = os.environ.get(VARIABLE)
    if named:
        yield Path(named).absolute()
        return
    from deq_compile.torch_parts import inductor_cache_dir as cache_dir

    yield Path(cache_dir())
    yield Path(cache_dir()) / f"deq_compile_{_user()}"
    with contextlib.suppress(RuntimeError):  # there is no home
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "deq_compile"


@contextlib.contextmanager
def inductor_writes_to(folder: Path) -> Iterator[None]:
    """Inductor's cache in another folder, for the whole process: for the moments in which our own library is made or found."""
    from deq_compile.torch_parts import inductor_cache_dir as cache_dir

    if folder == Path(cache_dir()):
        yield
        return
    before = os.environ.get(_INDUCTOR)
    os.environ[_INDUCTOR] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_INDUCTOR]
        else:
            os.environ[_INDUCTOR] = before
