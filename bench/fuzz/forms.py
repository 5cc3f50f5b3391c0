"""The grammar's sentences: the loops that users write around a body, as source text of `forward`.

`self.f(z, x)` and `self.g(z, x)` are random bodies that keep the shape of z; `{z0}` is an initial state, `{u}` the
injection, N the count. Lines before `return` define `z`, and what else is returned.
"""

from __future__ import annotations

from .forms_schemes import SCHEMES
from .forms_states import STATES
from .forms_surroundings import SURROUNDINGS
from .forms_today import TODAY

FORMS: dict[str, str] = {**SCHEMES, **STATES, **SURROUNDINGS, **TODAY}
