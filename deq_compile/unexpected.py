"""What becomes of an exception that nobody foresaw, in capture or in a pass: it never fails the user's compile.

It is logged with its traceback, said once in a warning, and stands in the report; the user's code is compiled as it is.
"""

from __future__ import annotations

import logging
import os
import warnings

from .report import Location, Reason, Skipped

log = logging.getLogger("deq_compile")

# "1": such an exception is raised. The test suite sets it, so that no bug is survived in silence there.
SWITCH = "DEQ_COMPILE_RAISE"

_warned: set[str] = set()


def survive(error: Exception, doing: str, location: Location | None = None) -> Skipped:
    """Say what happened, once for each kind; a line for the report.

    Args:
        error: what was caught.
        doing: what was being done, in a few words.
        location: the user's line that was worked on, where that is known.

    Raises:
        Exception: `error` itself, where the environment says DEQ_COMPILE_RAISE=1.
    """
    if os.environ.get(SWITCH) == "1":
        raise error
    text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    log.error("unexpected exception while %s: %s", doing, text, exc_info=error)
    kind = f"{doing}: {type(error).__name__}"
    if kind not in _warned:
        _warned.add(kind)
        warnings.warn(
            f"deq_compile met a bug of its own while {doing} ({text}); the model is compiled without it. The traceback is in the "
            f"log; please report it. {SWITCH}=1 raises it",
            RuntimeWarning,
            stacklevel=2,
        )
    return Skipped(Reason.UNEXPECTED, location or Location(), f"{doing}: {text}")
