# The only spelling of every task. `make` or `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules
.SUFFIXES:

VENV ?= .venv
STORE ?= model-store
# The first of these that is 3.11 or newer makes the environment; `make PYTHON=/path/to/python setup` overrides.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; exit; }; done; echo python3)
# Name to archive and serve under: MODEL, without folders and .py where it is a config path.
NAME ?= $(patsubst %.py,%,$(notdir $(MODEL)))

PY := $(VENV)/bin/python
STAMP := $(VENV)/.setup-stamp
SETUP_INPUTS := pyproject.toml tools/setup_env.py $(wildcard requirements/*.lock)
CODE := serve handlers tools tests
UV_VERSION := 0.13.8

.PHONY: help setup lint format test demo demo-evaluate demo-train bench-detector archive serve stop lock clean distclean

help: ## List the tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "Settings: PYTHON, VENV, STORE (folder of archives), TORCH_INDEX (package index to take torch from)"

$(STAMP): $(SETUP_INPUTS)
	@$(PYTHON) tools/setup_env.py --venv $(VENV) $(if $(TORCH_INDEX),--torch-index-url $(TORCH_INDEX))

setup: $(STAMP) ## Make .venv with everything in it (wheels only; keeps a torch that fits)
	@echo "setup: $(VENV) is up to date"

lint: $(STAMP) ## Check style and types: ruff, mypy strict
	$(VENV)/bin/ruff check $(CODE)
	$(VENV)/bin/ruff format --check $(CODE)
	$(VENV)/bin/mypy

format: $(STAMP) ## Rewrite the code in the style that lint checks
	$(VENV)/bin/ruff check --fix $(CODE)
	$(VENV)/bin/ruff format $(CODE)

test: $(STAMP) ## Run the tests; TESTS="path -k words" picks some
	$(PY) -m pytest $(TESTS)

demo: $(STAMP) ## Serve the demonstration SECOND and print a curl line that works; Ctrl-C stops it
	@exec $(PY) tools/demo.py

demo-evaluate: $(STAMP) ## Measure the demonstration SECOND on held-out synthetic scenes
	@exec $(PY) tools/demo_evaluate.py $(ARGS)

demo-train: $(STAMP) ## Train the demonstration SECOND anew on synthetic scenes (CPU)
	@exec $(PY) tools/demo_train.py

bench-detector: $(STAMP) ## Time upstream's inference beside ours [ARGS="second --frame F --device cuda:0"]
	@exec $(PY) tools/bench_detector.py $(ARGS)

archive: $(STAMP) ## Make STORE/NAME.mar of MODEL=name [CONFIG=file CHECKPOINT=file NAME=name STORE=folder]
	@$(if $(or $(MODEL),$(CONFIG)),,echo "error: say which model: make archive MODEL=second" >&2; exit 2)
	@exec $(PY) tools/archive.py $(or $(CONFIG),$(MODEL)) --output-folder $(STORE) \
		$(if $(NAME),--model-name $(NAME)) $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT)) $(ARGS)

serve: $(STAMP) ## Serve MODEL=name on ports 8080-8082, archiving it first where STORE has none; Ctrl-C stops it
	@$(if $(NAME),,echo "error: say which model: make serve MODEL=second" >&2; exit 2)
	@test -f $(STORE)/$(NAME).mar || $(MAKE) --no-print-directory archive
	@exec $(PY) tools/serve_archives.py --store $(STORE) --models $(NAME) $(ARGS)

stop: $(STAMP) ## Stop what `make serve` or `make demo` left running elsewhere
	@exec $(PY) tools/serve_archives.py --stop

lock: $(STAMP) ## Renew requirements/*.lock from requirements/*.in
	$(PY) -m pip install --quiet --only-binary=:all: uv==$(UV_VERSION)
	cd requirements && for name in runtime dev; do \
		../$(PY) -m uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
			--no-emit-index-url --no-emit-find-links --excludes excludes.txt $$name.in -o $$name.lock; done

clean: ## Remove caches and build outputs; keeps the environment, archives and downloads
	rm -rf build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Also remove the environment
	rm -rf $(VENV)
