# make demo          train one model three ways (eager, Inductor, deq) on real digits, print the table, write demo.png
# make test          ruff, mypy, pytest: the gate
# make test-all      the same with the tests that take long: a private name of torch taken away at a time, a rehearsal of the GPU's bench
# make test-oldest   the same on torch 2.11 and Python 3.12, in an environment of its own
# make docs          the site, into build/site; warnings are errors
# make bench         one training step, the user's eager loop against backend="deq"
#
# PYTHON=…           the interpreter that makes .venv (3.10 or newer)
# TORCH_INDEX=URL    where pip takes torch from, for instance https://download.pytorch.org/whl/cpu to avoid the CUDA build on Linux
# ARGS=…             passed on to pytest, the demo or the benchmark

PYTHON ?= python3
VENV ?= .venv
VENV_OLDEST ?= .venv-oldest
TORCH_INDEX ?=
ARGS ?=

# Two processes, however many cores there are: each test is told to use one thread, and memory is not without end.
PARALLEL ?= -n 2 --dist worksteal

PIP_FLAGS := --quiet --disable-pip-version-check
RUN := $(VENV)/bin/python
RUN_OLDEST := $(VENV_OLDEST)/bin/python

or_say_so = || { echo "make: expected pip to install the development set into $(@D); it failed, with the error above."; \
  echo "fix: without a network, name a package index that answers with PIP_INDEX_URL, and one for torch with TORCH_INDEX;"; \
  echo "     then make again, which goes on where it stopped"; exit 1; }

# torch goes in first and at its pin: nothing that follows can then pull another build of it. The build tools come with it, since the
# project itself is installed without build isolation (one download less, and the pinned hatchling).
# $(call install,PYTHON_OF_VENV,CONSTRAINTS)
define install
@$(1) -m pip install $(PIP_FLAGS) -c $(2) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch $(or_say_so)
@$(1) -m pip install $(PIP_FLAGS) -c $(2) hatchling editables $(or_say_so)
@$(1) -m pip install $(PIP_FLAGS) -c $(2) --no-build-isolation -e '.[dev]' $(or_say_so)
@touch $(@)
endef

.PHONY: help demo test test-all test-oldest docs bench lint typecheck clean
help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else f"expected Python 3.10 or newer, got {v[0]}.{v[1]}; fix: make PYTHON=python3.12 …")'
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned development set into $(VENV) (the first time downloads torch)"
	$(call install,$(RUN),constraints.txt)

$(VENV_OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	@test -x $(RUN_OLDEST) || { \
	  if python3.12 -c '' 2>/dev/null; then python=python3.12; \
	  elif found=$$(pyenv versions --bare 2>/dev/null | grep -E '^3\.12(\.[0-9]+)?$$' | tail -n 1) && [ -n "$$found" ]; \
	  then python="$$(pyenv prefix $$found)/bin/python3.12"; \
	  else echo "make test-oldest: expected a Python 3.12 interpreter, as python3.12 on PATH or under pyenv; got none."; \
	       echo "fix: install Python 3.12 (for instance: pyenv install 3.12)"; exit 1; fi; \
	  "$$python" -m venv $(VENV_OLDEST); }
	@echo "installing torch 2.11 and the tools into $(VENV_OLDEST)"
	$(call install,$(RUN_OLDEST),constraints-oldest.txt)

demo: $(VENV)/.installed
	@$(RUN) -m bench demo $(ARGS)

bench: $(VENV)/.installed
	@$(RUN) -m bench step $(ARGS)

docs: $(VENV)/.installed
	$(RUN) -m sphinx -W --keep-going -q -b html docs build/site
	@echo "build/site/index.html"

# The linked folders are checked under both names; pyproject.toml says why.
lint: $(VENV)/.installed
	$(RUN) -m ruff check --quiet . deq_compile/kernels deq_compile/passes
	$(RUN) -m ruff format --quiet --check .

typecheck: $(VENV)/.installed
	$(RUN) -m mypy

test: lint typecheck
	$(RUN) -m pytest -q -m "not thorough" $(PARALLEL) $(ARGS)

test-all: lint typecheck
	$(RUN) -m pytest -q $(PARALLEL) $(ARGS)

# An ignore that torch 2.13 needs may be unused under 2.11, so that one warning is off here.
test-oldest: $(VENV_OLDEST)/.installed
	$(RUN_OLDEST) -m ruff check --quiet . deq_compile/kernels deq_compile/passes
	$(RUN_OLDEST) -m mypy --no-warn-unused-ignores
	$(RUN_OLDEST) -m pytest -q $(PARALLEL) $(ARGS)

# Environments stay: they cost a download. Remove them by hand.
clean:
	rm -rf build dist demo.png .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
