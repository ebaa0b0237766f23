# The only spelling of every task. `make` or `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules
.SUFFIXES:

VENV ?= .venv
STORE ?= model-store
# What `make image` builds and calls it, and what `make k8s-render` prints.
TARGET ?= serve
IMAGE ?= mmdet3d-serve$(if $(filter gateway,$(TARGET)),-gateway)
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' serve/__init__.py)
OVERLAY ?= cpu
# The first of these that is 3.11 or newer makes the environment; `make PYTHON=/path/to/python setup` overrides.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; exit; }; done; echo python3)
# Name to archive and serve under: MODEL, without folders and .py where it is a config path.
NAME ?= $(patsubst %.py,%,$(notdir $(MODEL)))

PY := $(VENV)/bin/python
STAMP := $(VENV)/.setup-stamp
TRAIN_STAMP := $(VENV)/.train-stamp
SETUP_INPUTS := pyproject.toml setup.py tools/setup_env.py $(wildcard tools/environment/*.py) serve/ops/autoload.py $(wildcard requirements/*.lock)
CODE := serve handlers tools tests
# How `make test` divides the tests (docs/testing.md): JOBS processes side by side.
JOBS ?= 2
# Rows of `make test-extras`, what takes longest first, so that of two jobs none is left with it at the end.
EXTRAS ?= ui ray triton labelling train parquet rerun proto
PARALLEL := --numprocesses $(JOBS) --dist loadscope --no-loadscope-reorder --max-worker-restart 2

# Run a command for a task that will go, after a warning that names the command to use.
deprecated = echo "warning: make $@ will be removed in 0.3; use: $(strip $(1))" >&2; exec $(1)

.PHONY: help setup setup-train lint lint-style lint-types lint-pages format docs test test-quick test-attack test-gpu test-extras test-labelling test-parquet test-proto test-ray test-rerun test-train test-triton test-ui test-soak demo demo-evaluate demo-train zoo-coverage bench bench-detector bench-ops bench-native bench-storage bench-env bench-serving archive fetch-models pack serve stop wheel image image-check wheel-client compose-up k8s-render k8s-check sbom check-range lock proto ui clean distclean

help: ## List the tasks
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@awk -F ':' '/^[a-z0-9-]+:.*#: / { line = line " " $$1 } END { print "Also, described in the Makefile:" line }' \
		$(firstword $(MAKEFILE_LIST)) | fold -s -w 110
	@echo "Settings: PYTHON, VENV, STORE (folder of archives), TORCH_INDEX (package index to take torch from)"

$(STAMP): $(SETUP_INPUTS)
	@$(PYTHON) tools/setup_env.py --venv $(VENV) $(if $(TORCH_INDEX),--torch-index-url $(TORCH_INDEX))

setup: $(STAMP) ## Make .venv with everything in it (wheels only; keeps a torch that fits)
	@echo "setup: $(VENV) is up to date"

setup-train: $(TRAIN_STAMP) ## Add to .venv what some data sets need for training, testing and conversion
	@echo "setup-train: $(VENV) is up to date"

$(TRAIN_STAMP): $(STAMP) requirements/train.lock
	@$(PY) tools/setup_env.py --venv $(VENV) --train
	@touch $@

# Parts, which `make --jobs 2 lint` runs side by side.
lint: lint-style docs lint-types lint-pages ## Check style, types, layers of imports, Dockerfile, links and names in the documentation

lint-style: $(STAMP) #: Style, layers of imports and the Dockerfile, of `make lint`
	$(VENV)/bin/ruff check $(CODE)
	$(VENV)/bin/ruff format --check $(CODE)
	PYTHONPATH=. $(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/hadolint docker/serve/Dockerfile

lint-types: $(STAMP) #: Types, of `make lint`
	$(VENV)/bin/mypy

# The notebook runs in `make test`.
lint-pages: $(STAMP) #: Links and names in the documentation, of `make lint`
	$(PY) -m pytest -q -p no:cacheprovider -m "not slow" tests/docs

docs: $(STAMP) ## Build the documentation as a site, build/site; a broken link or anchor fails
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

format: $(STAMP) ## Rewrite the code in the style that lint checks
	$(VENV)/bin/ruff check --fix $(CODE)
	$(VENV)/bin/ruff format $(CODE)

test: $(STAMP) ## Run all tests but the soak; TESTS="path -k words" picks some
	$(PY) -m pytest -m "not soak" $(or $(TESTS),$(PARALLEL))

test-quick: $(STAMP) ## Run the tests that need no server and no large model (minutes); TESTS picks some
	$(PY) -m pytest -m "not soak and not slow and not torchserve and not timing" $(or $(TESTS),$(PARALLEL))

test-soak: $(STAMP) ## Run chaos at length, benchmarks, the bounds-checked fuzz, the zoo sweep; TESTS picks some
	$(PY) -m pytest -m soak $(TESTS)

test-gpu: $(STAMP) ## Run the tests that need a CUDA device, and name those skipped without one; TESTS picks some
	$(PY) -m pytest -m gpu $(TESTS)

test-extras: $(patsubst %,test-%,$(filter-out $(WITHOUT),$(EXTRAS))) ## Run the tests that need packages of their own, in .venv-NAME each; EXTRAS="ui rerun" picks, WITHOUT=ui leaves out

# A row: the tests of packages that the project's environment lacks, in .venv-NAME of requirements/NAME.lock.
test-labelling: EXTRA := tests/labelling #: The SDKs of CVAT and Label Studio
test-proto: EXTRA := tests/gateway/grpc/test_wire.py #: The compiled messages of gRPC are those of their sources
test-parquet: EXTRA := tests/bulk/test_formats.py #: pyarrow reads what bulk writes
test-ray: EXTRA := tests/bulk/test_ray*.py #: Bulk runs on Ray, on clusters of this machine that lose a part
test-rerun: EXTRA := tests/predict/test_recording_files.py #: rerun reads what predict writes
test-train: EXTRA := tests/evaluate/test_releases.py tests/evaluate/test_picture_sets.py #: Metrics of nuScenes, Lyft, Cityscapes
test-triton: EXTRA := tests/ops/test_triton_kernels.py #: The kernels in Triton, interpreted and compiled, without a GPU
test-ui: EXTRA := tests/ui #: The page in this machine's Chromium
# A test that is skipped fails here: what it needs is what its row is for. With RETRY=1 what failed is tried once more;
# two rows may spoil each other's list of it, and then the whole row is.
$(EXTRAS:%=test-%): test-%: .venv-%/.stamp
	.venv-$*/bin/python -m pytest --no-skips $(or $(TESTS),$(EXTRA))$(if $(RETRY), || \
		.venv-$*/bin/python -m pytest --no-skips --last-failed $(or $(TESTS),$(EXTRA)))

test-attack: $(STAMP) ## Run every attack of tests/attacks, the long ones too; TESTS picks some
	$(PY) -m pytest $(or $(TESTS),tests/attacks)

demo: $(STAMP) ## Serve the demo SECOND and print a curl line that works; Ctrl-C stops it
	@exec $(PY) -m serve demo $(ARGS)

bench: $(STAMP) $(if $(WITH),.venv-$(WITH)/.stamp) ## Measure: NAME=detector, ops, serving, grpc, fairness, shadow, workers, bulk, storage; NAME=native-env for --native-python [ARGS="--help"]; WITH=ray adds the packages of an extra
	@exec $(if $(WITH),.venv-$(WITH)/bin/python,$(PY)) -m tools.bench $(or $(NAME),--help) $(ARGS)

bench-env: .venv-bench/.stamp #: Make .venv-bench with LitServe, mosec and BentoML, for NAME=serving
	@echo "bench-env: .venv-bench is up to date"

# Environments with packages of their own that see the project's behind them: those servers can serve our models. pip
# sees it too, and installs no package twice.
.PRECIOUS: .venv-%/.stamp
.venv-%/.stamp: requirements/%.lock $(STAMP)
	$(PY) -m venv --clear $(@D)
	@$(PY) -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --require-hashes \
		--only-binary=:all: -r requirements/$*.lock
	@touch $@

archive: $(STAMP) ## Make STORE/NAME.mar of MODEL=name [CONFIG=file CHECKPOINT=file NAME=name STORE=folder]
	@$(if $(or $(MODEL),$(CONFIG)),,echo "error: MODEL is not set; try: make archive MODEL=second" >&2; exit 2)
	@exec $(PY) -m serve archive $(or $(CONFIG),$(MODEL)) --output-folder $(STORE) \
		$(if $(NAME),--model-name $(NAME)) $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT)) $(ARGS)

serve: $(STAMP) ## Serve MODEL=name on port 8000 (TorchServe on 8080-8082); archives it first if STORE has none [ARGS=--help]
	@$(if $(NAME),,echo "error: MODEL is not set; try: make serve MODEL=second" >&2; exit 2)
	@test -f $(STORE)/$(NAME).mar || $(MAKE) --no-print-directory archive ARGS= || test -f $(STORE)/$(NAME).mar
	@exec $(PY) -m serve serve --store $(STORE) --models $(NAME) $(ARGS)

stop: $(STAMP) ## Stop what `make serve` or `make demo` left running elsewhere
	@exec $(PY) -m serve stop

# The environment's setuptools builds it, else one that pip fetches; files of former builds would get into it.
wheel: ## Build the project's wheel into docker/serve, for `docker build docker/serve/` and for mmcv's kernels elsewhere
	@rm -rf build/lib build/bdist.* docker/serve/*.whl
	@$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m pip wheel --quiet --no-deps --wheel-dir docker/serve \
		$(if $(wildcard $(PY)),--no-build-isolation --no-index) .
	@ls docker/serve/*.whl

wheel-client: $(STAMP) ## Build the client's wheel, mmdet3d-serve-client, into build/client: httpx and numpy, no torch
	@$(PY) -m tools.client_wheel

image: wheel ## Build the image mmdet3d-serve:latest [TARGET=gateway TORCH_LOCK=requirements/torch-cpu.lock TORCH_INDEX=URL]
	docker build --target $(TARGET) --tag $(IMAGE):latest --tag $(IMAGE):$(VERSION) \
		--build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse HEAD) \
		--build-arg CREATED=$$(date -u +%Y-%m-%dT%H:%M:%SZ) \
		$(foreach name,BASE_IMAGE IMAGE_EXTRAS TORCH_LOCK TORCH_INDEX PIP_INDEX_URL SOURCE,$(if $($(name)),--build-arg $(name)=$($(name)))) docker/serve/

image-check: $(STAMP) wheel #: Build and run the image without an engine: root, buildah, debootstrap; minutes, gigabytes [ARGS=--help]
	@exec $(PY) docker/check_image.py $(ARGS)

compose-up: wheel #: Start the service with Prometheus and Grafana [MODEL_STORE=folder WORKERS=1]; docker/compose.yaml
	docker compose --file docker/compose.yaml up --build

k8s-render: $(STAMP) #: Print the Kubernetes objects of OVERLAY=cpu, gpu or kserve
	@$(VENV)/bin/kubectl kustomize k8s/overlays/$(OVERLAY)

sbom: $(STAMP) #: Write the list of all parts, CycloneDX: build/sbom.cdx.json
	@test -x build/sbom/bin/cyclonedx-py || { $(PY) -m venv build/sbom && build/sbom/bin/python -m pip install --quiet \
		--no-deps --require-hashes --only-binary=:all: -r requirements/sbom.lock; }
	@build/sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type application --output-reproducible \
		--output-file build/sbom.cdx.json $(PY)
	@echo "build/sbom.cdx.json: $$(grep -c '"bom-ref"' build/sbom.cdx.json) parts"

# Options of uv for every lock: valid on every platform and Python, no index named (every mirror works), wheels only.
COMPILE = $(VENV)/uv/bin/uv pip compile --python $(PY) --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	--no-emit-index-url --no-emit-find-links --only-binary=:all: $(if $(UPGRADE),--upgrade)
check-range: $(STAMP) #: Show that the ends of the range of torch and Python work, in environments of their own (gigabytes) [ARGS=--help]
	@exec $(PY) -m tools.check_range $(ARGS)

lock: $(STAMP) #: Renew requirements/*.lock from pyproject.toml [UPGRADE=1 for the newest versions]
	@test -x $(VENV)/uv/bin/uv || $(PY) -m pip install --quiet --disable-pip-version-check --target $(VENV)/uv --no-deps \
		--require-hashes --only-binary=:all: -r requirements/installer.lock
	$(COMPILE) pyproject.toml --extra models --group torch-needs --excludes requirements/runtime.exclude -o requirements/runtime.lock
	$(COMPILE) pyproject.toml --extra gateway -c requirements/runtime.lock -o requirements/gateway.lock
	for name in dev cvat grpc otel proto video recordings parquet ray rerun image installer torch-cuda triton; do \
		$(COMPILE) --group $$name -c requirements/runtime.lock -o requirements/$$name.lock; done
	$(COMPILE) --group labelling --excludes requirements/labelling.exclude \
		-c requirements/cvat.lock -c requirements/runtime.lock -o requirements/labelling.lock
	$(COMPILE) --group tracks --excludes requirements/tracks.exclude -c requirements/runtime.lock -o requirements/tracks.lock
	for name in sbom bench ui; do \
		$(COMPILE) --group $$name --excludes requirements/torch.exclude -o requirements/$$name.lock; done
	$(COMPILE) --no-config --group train --excludes requirements/train.exclude --overrides requirements/train.override \
		-c requirements/runtime.lock -o requirements/train.lock

# What it makes is in git, so that neither `make setup` nor an image needs Node (docs/ui.md).
ui: #: Build the page's scripts of serve/gateway/ui/source into serve/gateway/ui/built; needs Node 20 or newer
	@mkdir -p build/ui && find build/ui -mindepth 1 -maxdepth 1 ! -name node_modules -exec rm -rf {} +
	@cp -R serve/gateway/ui/source/. build/ui
	cd build/ui && npm ci --ignore-scripts --no-audit --no-fund && npm run build -- ../../serve/gateway/ui/built

proto: .venv-proto/.stamp #: Compile serve/gateway/grpc/*.proto
	cd serve/gateway/grpc && for name in open_inference health; do \
		$(CURDIR)/.venv-proto/bin/python -m grpc_tools.protoc -I. --descriptor_set_out=$$name.binpb $$name.proto; done

clean: ## Remove caches and build outputs; keeps the environment, archives and downloads
	rm -rf build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean #: Also remove the environment
	rm -rf $(VENV) .venv-bench $(EXTRAS:%=.venv-%)

# Until 0.3: tasks that wrap one command. Each prints the command to use instead.
demo-evaluate: $(STAMP) #- python -m tools.demo evaluate
	@$(call deprecated,$(PY) -m tools.demo evaluate $(ARGS))

demo-train: $(STAMP) #- python -m tools.demo train
	@$(call deprecated,$(PY) -m tools.demo train $(ARGS))

zoo-coverage: $(STAMP) #- python -m tools.zoo sweep
	@$(call deprecated,$(PY) -m tools.zoo sweep $(ARGS))

bench-detector: $(STAMP) #- make bench NAME=detector
bench-ops: $(STAMP) #- make bench NAME=ops
bench-serving: $(STAMP) #- make bench NAME=serving
bench-storage: $(STAMP) #- make bench NAME=storage
bench-detector bench-ops bench-serving bench-storage:
	@$(call deprecated,$(PY) -m tools.bench $(@:bench-%=%) $(ARGS))

bench-native: $(STAMP) #- make bench NAME=native-env
	@$(call deprecated,$(PY) -m tools.bench native-env $(ARGS))

fetch-models: $(STAMP) #- mmdet3d-serve fetch
	@$(if $(FROM),,echo "error: FROM is not set; try: make fetch-models FROM=s3://bucket/models" >&2; exit 2)
	@$(call deprecated,$(PY) -m serve fetch --from $(FROM) --to $(STORE) $(ARGS))

pack: $(STAMP) #- mmdet3d-serve pack
	@$(if $(and $(FOLDER),$(OUT)),,echo "error: FOLDER or OUT is not set; try: make pack FOLDER=data/kitti OUT=kitti.ffr" >&2; exit 2)
	@$(call deprecated,$(PY) -m serve pack $(FOLDER) $(OUT) $(ARGS))

k8s-check: $(STAMP) #- make test TESTS=tests/deployment/test_manifests.py
	@$(call deprecated,$(PY) -m pytest tests/deployment/test_manifests.py)
