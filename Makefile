# Thin names for the commands. `make` alone lists them.
# PYTHON       the interpreter that .venv is made from (3.11 or newer)
# TORCH        cpu (default) or cuda: the build of torch that a new .venv gets
# TORCH_INDEX  where the CPU build comes from

PYTHON ?= python3
TORCH ?= cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# An index that does not answer costs at most these seconds: the alarm outlives execv.
WITHIN_20_SECONDS := $(BIN)/python -c 'import os, signal, sys; signal.alarm(20); os.execv(sys.argv[1], sys.argv[1:])'

.PHONY: help demo test lint format bench clean unfinished

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z.]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv ## distil the embedded digits teacher and show what was lost
	$(BIN)/hdistill run digits

test: .venv ## run the whole suite
	$(BIN)/python -m pytest --durations=15

lint: .venv ## check style, types and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

format: .venv ## apply the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv ## run every benchmark in its quick form
	@for file in $(wildcard benchmarks/[a-z]*.py); do \
	    name=$$(basename $$file .py); echo "== $$name"; $(BIN)/python -m benchmarks.$$name --quick || exit 1; \
	done

clean: ## remove caches and build leftovers (runs and .venv stay)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

# A directory is new as soon as it exists, so an installation that failed half-way is told by a mark inside it.
.venv: pyproject.toml constraints.txt $(if $(wildcard .venv/.unfinished),unfinished) ## make the environment (TORCH=cuda for a GPU)
	@case "$(TORCH)" in cpu | cuda) ;; *) echo "TORCH=$(TORCH): it is cpu or cuda" >&2; exit 2 ;; esac
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    found=$$($(PYTHON) --version 2>/dev/null || echo missing); \
	    echo "hdistill needs Python 3.11 or newer, and $(PYTHON) is $$found." \
	        "Name another one: make $(or $(MAKECMDGOALS),.venv) PYTHON=python3.12" >&2; exit 2; }
	@mkdir -p .venv && touch .venv/.unfinished
	$(PYTHON) -m venv .venv
	@if [ "$(TORCH)" = cpu ] && ! $(WITHIN_20_SECONDS) $(BIN)/pip index versions torch \
	        --index-url $(TORCH_INDEX) --retries 0 --timeout 5 >/dev/null 2>&1; then \
	    echo "$(TORCH_INDEX) does not answer: taking torch from the default package index" \
	        "(on Linux that is usually the CUDA build, several GB)"; \
	    set --; \
	elif [ "$(TORCH)" = cpu ]; then \
	    set -- --no-deps --index-url $(TORCH_INDEX); \
	else \
	    set --; \
	fi; \
	echo "$(PIP) install $$* -c constraints.txt torch torchvision"; \
	$(PIP) install --quiet "$$@" -c constraints.txt torch torchvision
	@echo "installing the rest, which takes a minute or some"
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@rm .venv/.unfinished
	@touch .venv
