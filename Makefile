# Everything there is to do with this project. Needs make and a Python of 3.11 or newer; no root, no database.
.DEFAULT_GOAL := help
.PHONY: help run demo test test-long lint faults bench replay lock clean FORCE
SHELL := /bin/sh

VENV := .venv
BIN := $(VENV)/bin
AUDIT_SECONDS := 15
# Processes of a test run: more than two cores, since tests also wait.
WORKERS := 4
# The newest Python on the PATH that will do, unless PYTHON names one.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo $$p; break; }; done)

help: ## show this
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

run: $(VENV)/run.stamp ## serve on 127.0.0.1:8080 with a PostgreSQL of its own (ORDER_TRACKING_* settings hold)
	@exec $(BIN)/order-tracking serve

demo: $(VENV)/run.stamp ## play Komerce against a service of its own, to look at; Ctrl-C ends it and its data
	@# The service is no part of what Ctrl-C reaches: it is still there when the simulator asks for its account.
	@dir=$$(mktemp -d) && chmod 711 "$$dir" && : >"$$dir/.env" && : >"$$dir/log" || exit 1; \
	export ORDER_TRACKING_STATE_DIR="$$dir" ORDER_TRACKING_ENV_FILE="$$dir/.env" ORDER_TRACKING_DATABASE_URL= \
		ORDER_TRACKING_WEBHOOK_TOKENS= ORDER_TRACKING_WEBHOOK_HMAC_SECRET= \
		ORDER_TRACKING_HOST= ORDER_TRACKING_TRUSTED_PROXIES= ORDER_TRACKING_LOG_FORMAT=; \
	$(BIN)/python -c 'import os, sys; os.setpgrp(); os.execv(sys.argv[1], sys.argv[1:])' \
		$(BIN)/order-tracking serve >"$$dir/log" 2>&1 & pid=$$!; \
	trap 'trap "" INT TERM HUP; kill $$pid 2>/dev/null; wait $$pid; rm -rf "$$dir"' EXIT; \
	trap 'exit 0' INT TERM HUP; \
	until url=$$(sed -n 's/^order-tracking listens on //p' "$$dir/log") && [ -n "$$url" ]; do \
		kill -0 $$pid 2>/dev/null || { cat "$$dir/log" >&2; exit 1; }; sleep 0.1; done; \
	echo "look at $$url/ while Komerce, simulated, tells of orders; Ctrl-C ends it"; \
	$(BIN)/order-tracking simulate --url "$$url/webhook" --orders 300 --rate 5 --duplicates 0.05 --reorder 0.05 \
		--delay 0.02 --hang-up 0.02 --unknown 0.01 $(ARGS) && told="all is told" || told="the simulator failed"; \
	echo "$$told; the service goes on at $$url/ until Ctrl-C"; wait $$pid

test: $(VENV)/dev.stamp ## run the tests against a real PostgreSQL, with coverage
	@rm -f .coverage .coverage.*
	$(BIN)/python -m coverage run -m pytest $(or $(ARGS),--numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder --durations=10)
	@$(BIN)/python -m coverage combine -q
	@# Branches too. A selection of tests (ARGS) is not measured against these.
	@[ -n "$(ARGS)" ] || $(BIN)/python -m coverage report --include='domain/*' --fail-under=100
	@[ -n "$(ARGS)" ] || $(BIN)/python -m coverage report --include='projections/*,service/*' --fail-under=90

test-long: $(VENV)/dev.stamp ## run the tests that take long by nature: every fault, a million orders, many examples
	$(BIN)/python -m pytest -m long --durations=0 $(ARGS)
	@[ -n "$(ARGS)" ] || TEST_EXAMPLES=5000 $(BIN)/python -m pytest --numprocesses=2 tests/unit

lint: $(VENV)/dev.stamp ## check style, types and import directions
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/python -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'
	$(BIN)/python -m bandit --quiet --configfile pyproject.toml --recursive domain projections service
	@# What is not said of a vulnerability is said of a source that cannot be reached, which is no fault of ours.
	@said=$$($(BIN)/python -m pip_audit --requirement requirements.lock --disable-pip --progress-spinner off \
		--timeout $(AUDIT_SECONDS) 2>&1) && echo "pip-audit: $$(echo "$$said" | head -n 1);" \
		"$$(echo "$$said" | grep -c 'could not be audited') packages are unknown to its source" || { \
		case "$$said" in *"known vulnerabilit"*) echo "$$said" >&2; exit 1;; esac; \
		echo "pip-audit: its source cannot be reached, nothing was audited"; }

faults: $(VENV)/dev.stamp ## break everything that can break, under load, and check that nothing is lost
	@$(BIN)/python -m tests.faults $(ARGS)

bench: $(VENV)/dev.stamp ## measure against the named baselines and print the ratios
	@$(BIN)/python -m tests.benchmarks $(ARGS)

replay: $(VENV)/run.stamp ## rebuild every view from the log and swap them in
	@exec $(BIN)/order-tracking replay $(ARGS)

lock: ## pin the newest versions that pyproject.toml allows, with hashes (needs uv)
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		-o requirements.lock pyproject.toml
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		-c requirements.lock --group dev -o requirements-dev.lock pyproject.toml

clean: ## remove the virtual environment and what the tools left; never the data
	rm -rf $(VENV) .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .schemathesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/run.stamp: requirements.lock Makefile
	@$(MAKE) --no-print-directory venv LOCK=requirements.lock
	@touch $@

$(VENV)/dev.stamp: requirements-dev.lock Makefile
	@$(MAKE) --no-print-directory venv LOCK=requirements-dev.lock
	@touch $@ $(VENV)/run.stamp

.PHONY: venv
venv:
	@if [ -z "$(PYTHON)" ]; then \
		echo "no Python of 3.11 or newer is on the PATH: install one, or say make PYTHON=/path/to/python3.12" >&2; exit 1; fi
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "there is no $(PYTHON)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is too old: Python 3.11 or newer is needed (make PYTHON=...)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "$(PYTHON) comes without venv: install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@# A Python that has gone or moved leaves an environment that cannot be mended.
	@if [ -d $(VENV) ] && ! $(BIN)/python -c pass 2>/dev/null; then rm -rf $(VENV); fi
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@echo "installing what $(LOCK) pins"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r $(LOCK) || { \
		echo "the packages of $(LOCK) could not be installed: see above; a platform without a wheel of them needs" >&2; \
		echo "ORDER_TRACKING_DATABASE_URL and a PostgreSQL of yours, and pip without --only-binary" >&2; exit 1; }
	@# It finds the clone by its own place, and imports nothing from wherever it is called.
	@printf '%s\n' '#!/bin/sh' 'self=$$(readlink -f "$$0" 2>/dev/null || echo "$$0")' \
		'clone=$$(cd "$$(dirname "$$self")/../.." && pwd) || exit 1' \
		'PYTHONPATH="$$clone" exec "$$clone/.venv/bin/python" -P -m service "$$@"' > $(BIN)/order-tracking
	@chmod +x $(BIN)/order-tracking
