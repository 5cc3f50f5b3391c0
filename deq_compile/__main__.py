"""``python -m deq_compile``: what this machine can run, and what to do about the rest (see :mod:`.doctor`)."""

import sys

from .doctor import main

if __name__ == "__main__":
    sys.exit(main())
