# Every target, with what it does: make help
PYTHON ?= python3.11
ARGS ?=
PIP_ARGS ?=
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-xla check compile images lock manifests clean clean-all

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20
	@echo '  options: make demo ARGS="--set train_world.steps=500 --port 8001", PIP_ARGS="...", PYTHON=python3.12'

# The stamp is written last: an installation that was interrupted is done again.
.venv/installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: install Python 3.11 or set PYTHON=..." >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { rm -rf .venv && $(PYTHON) -m venv .venv; }
	@echo "[setup] installing into .venv what constraints.txt pins (a few minutes the first time)"
	PIP_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install $(PIP_ARGS) --editable '.[dev]'
	@touch $@

setup: .venv/installed  ## make .venv, or bring it up to date
	@echo "[setup] .venv is up to date"

demo: setup  ## from nothing to a CoinRun world to play in the browser, with its MLflow server
	@$(BIN)/python -m pipelines demo $(ARGS)

test: setup  ## run the tests
	$(BIN)/python -m pytest $(ARGS)

# torch-xla 2.9 wants torch 2.9: an environment of its own (7 GB), with what training needs of the rest.
.venv-xla/installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: install Python 3.11 or set PYTHON=..." >&2; exit 1; }
	@echo "[test-xla] installing torch-xla into .venv-xla (a few minutes the first time)"
	rm -rf .venv-xla && $(PYTHON) -m venv .venv-xla
	grep -v '^torch==' constraints.txt > .venv-xla/constraints.txt
	PIP_CONSTRAINT=.venv-xla/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 .venv-xla/bin/python -m pip install $(PIP_ARGS) --editable '.[tpu,dev]'
	@touch $@

test-xla: .venv-xla/installed  ## run the tests of training on TPU, on virtual devices of the CPU
	.venv-xla/bin/python -m pytest tests/xla $(ARGS)

check: setup  ## format, lint and type-check
	$(BIN)/ruff format .
	$(BIN)/ruff check .
	$(BIN)/mypy

compile: setup  ## write build/coinrun.yaml, the pipeline to upload in the Kubeflow UI
	@$(BIN)/python -m pipelines compile coinrun $(ARGS)

# make images REGISTRY=ghcr.io/example PUSH=1 IMAGES="serve collect" BASE=docker.io/library/python@sha256:...
# PIP_CONFIG_FILE=... is the pip.conf of the build, ARGS="--arg TORCH_INDEX=" whatever else the Dockerfile takes.
images: setup  ## build the container images; with REGISTRY=... PUSH=1 push them and pin their digests
	@$(BIN)/python manifests/images/build.py $(if $(REGISTRY),--registry $(REGISTRY)) $(if $(PUSH),--push) \
		$(if $(BASE),--arg BASE=$(BASE)) $(if $(IMAGES),--images $(IMAGES)) $(ARGS)

lock: setup  ## write the images' requirements anew, after pyproject.toml or constraints.txt changed
	@$(BIN)/python manifests/images/lock.py

# checkov brings ninety packages of its own versions: it has an environment to itself. Without it the rest is checked.
build/checkov/installed:
	@echo "[manifests] installing checkov into build/checkov (a minute, the first time)"
	@mkdir -p build && $(PYTHON) -m venv build/checkov && \
	  PIP_DISABLE_PIP_VERSION_CHECK=1 build/checkov/bin/python -m pip install -q $(PIP_ARGS) checkov==3.3.30 && touch $@ || \
	  { rm -rf build/checkov; echo "[manifests] checkov cannot be installed here, see above" >&2; }

manifests: setup build/checkov/installed  ## render manifests/overlays into build/manifests, and check them
	@$(BIN)/python -m manifests.check --checkov build/checkov/bin/checkov

clean:  ## remove what was built, but not what was collected and trained
	rm -rf build .pytest_cache .mypy_cache .ruff_cache *.egg-info

clean-all: clean  ## remove everything that make made: data sets, models, runs and .venv
	rm -rf .genie .venv .venv-xla
