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

# -qq keeps pip's errors and drops its warnings about indexes that lack a package.
# torch is asked for by its pin before anything else: a build for this machine that pip can see (a wheel folder, an
# index of CPU builds) then satisfies all the others, and the largest download happens once.
# --no-compile: Python compiles a module when it is first imported, and most of what is installed never is.
INSTALL = $(PIP) install -qq --no-compile $(CONSTRAINTS) torch

$(VENV)/.stamp-run: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV): a few minutes the first time"
	$(INSTALL) -e '.[plots]'
	@touch $@

$(VENV)/.stamp-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV): a few minutes the first time"
	$(INSTALL) -e '.[all,test,docs]'
	@touch $(VENV)/.stamp-run $@
