# `make help` lists the targets. Every target runs the setup first, which is quick if nothing changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.slmops-installed
DISTRIBUTIONS := shared services/access services/registry services/optimizer services/packager services/rollout services/telemetry services/gateway services/console deploy/local
PROJECTS := pyproject.toml constraints.txt $(addsuffix /pyproject.toml,$(DISTRIBUTIONS))
SOURCES := shared services deploy tests docs

.DEFAULT_GOAL := help
.PHONY: help setup demo up test test-slow check docs bench bench-optimizer bench-delta bench-fleet fuzz tuf-conformance clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

setup: $(STAMP)  ## install everything into .venv

$(STAMP): $(PROJECTS)
	@echo "setup: installing into $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt \
	  $(addprefix --editable ./,$(DISTRIBUTIONS)) --group dev
	@touch $@

demo: setup  ## run the demo: from a GGUF file to three gateways that serve it (ARGS="--model PATH" for your own)
	@$(BIN)/slmops demo $(ARGS)

up: setup  ## keep the system running for your own use
	@$(BIN)/slmops up $(ARGS)

# The tests start hundreds of processes. Without caches each would compile our modules again.
test test-slow: export PYTHONDONTWRITEBYTECODE :=

# Three workers on two cores, because many tests wait. The tests of a file share servers. The longest files run first.
test: setup  ## run all tests except the slow ones, and print the 25 slowest (ARGS="-n 0 -x": one at a time, until the first failure)
	@$(BIN)/pytest -m "not slow" -n 3 --dist loadfile --no-loadscope-reorder --durations=25 --durations-min=1 $(ARGS)

test-slow: setup  ## run the tests that take minutes: the demo, containers, repeated kills of each process
	@$(BIN)/pytest -m slow $(ARGS)

check: setup  ## check format, lint, types, layers, generated documents
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python docs/generate.py --check

docs: setup  ## generate docs/events.md, docs/states and docs/asyncapi
	@$(BIN)/python docs/generate.py

bench: setup  ## measure slmops against the bare tools, side by side; writes build/bench (ARGS="bus objects": only these)
	@PYTHONPATH=tests $(BIN)/python -m bench.run $(ARGS)

bench-optimizer: setup  ## measure every recipe on a real model, beside the builder's own (about an hour; ARGS="--minutes 5": short distillation)
	@PYTHONPATH=tests $(BIN)/python -m bench.optimizer $(ARGS)

bench-delta: setup  ## measure updates between versions of a real model, beside bsdiff, xdelta3, zstd and casync (half an hour; ARGS="--ours")
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --group bench
	@PYTHONPATH=tests $(BIN)/python -m bench.delta $(ARGS)

bench-fleet: setup  ## measure a fleet of 100,000 simulated gateways through a rollout; an interrupted run continues (ARGS="--gateways 1000")
	@PYTHONPATH=tests $(BIN)/python -m bench.fleet $(ARGS)

fuzz: setup  ## fuzz the file readers (ARGS="bundle --seconds 300"); new inputs are kept in tests/corpus
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --group fuzz
	@cd tests && ../$(BIN)/python -m fuzz $(or $(ARGS),delta)

tuf-conformance: setup  ## run TUF's conformance suite against `slmops trust client` (SUITE=a checkout of theupdateframework/tuf-conformance)
	@test -d "$(SUITE)" || { echo "name the folder of the suite: make tuf-conformance SUITE=FOLDER" >&2; exit 2; }
	@command -v faketime >/dev/null || { echo "the suite needs faketime (Debian: apt-get install faketime)" >&2; exit 2; }
	@test -x build/tuf-conformance/bin/python || $(PYTHON) -m venv build/tuf-conformance
	@build/tuf-conformance/bin/python -m pip install --quiet "$(SUITE)"
	@cd "$(SUITE)" && $(CURDIR)/build/tuf-conformance/bin/pytest tuf_conformance --entrypoint=$(CURDIR)/tests/conformance/tuf-client -q $(ARGS)

clean:  ## remove everything that was built and installed
	rm -rf $(VENV) build
