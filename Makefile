# make demo   install what a study needs into .venv and run the embedded default
# make test   install what the tests need besides, and run them all in JOBS processes (3), each file in one of them;
#             ARGS="-m 'not slow' -x" goes to pytest
# make install   install what the tests need, and run nothing
# make lint   ruff, then mypy
# make docs   the site of the documentation, in site/
# make clean  remove .venv, site/ and caches; results/ stays

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
ARGS ?=
, = ,
JOBS ?= 3
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
# constraints.txt was written for Python 3.11; another version installs from the ranges in pyproject.toml.
CONSTRAINTS = $(if $(findstring 3.11,$(shell $(PYTHON) --version)),-c constraints.txt)

.PHONY: demo test lint docs clean install

demo: $(VENV)/.stamp-run
	$(VENV)/bin/harness run

test: $(VENV)/.stamp-test
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

install: $(VENV)/.stamp-test

lint: $(VENV)/.stamp-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

docs: $(VENV)/.stamp-test
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

clean:
	rm -rf $(VENV) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find harness tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# uv installs several times as fast as pip. It does not read the settings of pip, which may name another index or a folder
# of wheels, so they are handed on. If uv fails, pip installs.
# torch is asked for by its pin: a build for this machine in that folder or index is then taken, for example one for CPUs.
# --no-compile: Python compiles a module when it is first imported, and most of what is installed never is.
define install
	@echo "installing into $(VENV): a few minutes the first time"
	@$(PIP) install -qq --no-compile $(CONSTRAINTS) uv || true
	@for name in find-links index-url extra-index-url; do \
		for value in $$($(PIP) config list | sed -n "s/^[^=]*\.$$name='\(.*\)'$$/\1/p" | head -n 1); do \
			options="$$options --$$name $$value"; \
		done; \
	done; \
	$(VENV)/bin/python -m uv pip install --quiet --python $(VENV)/bin/python --index-strategy unsafe-best-match \
		$$options $(CONSTRAINTS) torch -e '.[$(1)]' \
	|| $(PIP) install -qq --no-compile $(CONSTRAINTS) torch -e '.[$(1)]'
endef

$(VENV)/.stamp-run: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(call install,plots)
	@touch $@

$(VENV)/.stamp-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(call install,all$(,)test$(,)docs)
	@touch $(VENV)/.stamp-run $@
