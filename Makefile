# Two commands do everything: `make demo` and `make test`. Each sets up .venv first, once.

# The first of these that is Python 3.11 or newer; or say which: make PYTHON=/path/to/python demo
PYTHON ?= $(shell for python in python3.12 python3.11 python3 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$python; break; }; done)
BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)

.PHONY: help demo test tables lint setup

help:
	@echo 'make demo   attention on the best backend here, what the compiler makes of the kernels, and why'
	@echo 'make test   the tests that this machine can run; with a GPU, the GPU tests too'
	@echo 'make tables the kernels of every row of the tables of tiles, of which make test compiles a sample'
	@echo 'make lint   ruff and mypy'
	@echo 'make setup  only what the others do first: .venv with the versions in constraints.txt'

demo: $(READY)
	@$(BIN)/python -m cute_attn demo

# In as many processes as there are cores, eight at most: GPU tests share the GPU, and its memory.
test: $(READY)
	@$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# Needed after a change to kernels or to tables.
tables: $(READY)
	@$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal tests/host -m whole_tables

lint: $(READY)
	@$(BIN)/ruff check .; ruff=$$?; $(BIN)/mypy cute_attn layouts benchmarks && exit $$ruff

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@test -n '$(PYTHON)' || { echo 'Python 3.11 or newer is needed and was not found: try make PYTHON=/path/to/python'; exit 1; }
	@echo '[1/3] .venv with $(PYTHON)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo '[2/3] $(TORCH): first and by itself; the first time takes minutes'
	@$(PIP) install --no-compile '$(TORCH)'
	@echo '[3/3] cute-attn and what its kernels, tests, benchmarks and linters need, in the versions of constraints.txt'
	@$(PIP) install --no-compile -c constraints.txt -e '.[cu13,test,bench,dev]'
	@# On all cores, which pip does on one. Some packages have files that no Python compiles: pip ignores them, too. Of
	@# Transformers' models, a fifth of all that there is, hardly any are imported.
	@$(BIN)/python -W ignore -m compileall -qq -j 0 -x transformers/models/ .venv/lib || true
	@touch $@
	@echo 'set up'
