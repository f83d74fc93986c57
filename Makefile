# One definition of "green": people, pre-commit and CI call these targets. `make` alone lists them.
PYTHON ?= python3
OUT    ?= cupel-demo
VENV   := .venv
export UV_PROJECT_ENVIRONMENT := $(VENV)
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed
CODE   := src tests benchmarks

# what the two-minute part leaves out, and what no machine is expected to have
QUICK   := not full and not slow and not gpu and not network and not browser
DEFAULT := not slow and not gpu and not network

# One thread for each worker: two that take both cores fight for them. A module stays with one worker, whose fixtures it shares.
WORKERS ?= 2
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadscope

ifndef CUPEL_DATA
ifneq ($(wildcard ../shared/data),)
export CUPEL_DATA := $(abspath ../shared/data)
endif
endif

.DEFAULT_GOAL := help
.PHONY: help install demo test check lint slow gpu bench bench-parts bench-gpu calibrate lock clean

help:  ## This list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(READY)  ## Create .venv and install what the lock file names

# uv where it is found (20 s), else a venv that gets its own; --inexact keeps that one in place.
# Without the lock's index, as behind a mirror, the newest versions that pyproject.toml allows must do.
$(READY): pyproject.toml uv.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'make: Python 3.11 or newer is needed; name one with `make PYTHON=python3.12 ...`' >&2; exit 2; }
	@set -e; \
	python=$$($(PYTHON) -c 'import sys; print(sys.executable)'); \
	if uv --version >/dev/null 2>&1; then uv=uv; else \
	  test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	  test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv; \
	  uv=$(BIN)/uv; python=$(BIN)/python; \
	fi; \
	$$uv sync --frozen --inexact --all-extras --python "$$python" || { \
	  echo 'make: the locked versions cannot be had; installing what pyproject.toml asks for' >&2; \
	  test -x $(BIN)/python || $$uv venv --python "$$python" $(VENV); \
	  $$uv pip install --python $(BIN)/python -e '.[hub]' --group dev; \
	}
	@touch $@

demo: $(READY)  ## The whole path on embedded data (SEED=n, DATA=shapes, OUT=folder)
	$(BIN)/cupel demo --out $(OUT) $(if $(SEED),--seed $(SEED)) $(if $(DATA),--data $(DATA))
	@echo 'Open $(abspath $(OUT))/report.html in a browser; the numbers are in $(abspath $(OUT))/result.json.'

lint: $(READY)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy --strict src
	$(BIN)/lint-imports

check: lint  ## Lint, types, import rules and the two-minute part of the tests
	$(PYTEST) -m '$(QUICK)'

test: lint  ## All of `make check` and the rest of the default tests
	$(PYTEST) -m '$(DEFAULT)'

slow: $(READY)  ## Trained checks and full counts
	$(PYTEST) -m 'slow and not gpu and not network'

gpu: $(READY)  ## Tests that need a CUDA device
	$(BIN)/pytest -m gpu

bench: $(READY)  ## Hot paths beside the plain way, at most 10 minutes on an idle machine (ONLY="simclr knn", QUICK=1)
	$(BIN)/python -m benchmarks.whole $(if $(QUICK),--quick) $(if $(ONLY),--only $(ONLY))

bench-parts: $(READY)  ## Single steps, by pytest-benchmark
	$(BIN)/pytest benchmarks --benchmark-disable-gc --benchmark-columns=min,median,rounds

bench-gpu: $(READY)  ## Training steps as shares of what a CUDA device can do
	$(BIN)/python -m benchmarks.gpu

calibrate: $(READY)  ## Scan fresh clean encoders for the thresholds that ship with Cupel
	$(BIN)/python -m cupel.experiment.calibrate

lock:  ## Renew uv.lock (UPGRADE=1: newest versions)
	uv lock --default-index https://pypi.org/simple $(if $(UPGRADE),--upgrade)

clean:  ## Remove what was installed, cached or built; results stay
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .benchmarks
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
