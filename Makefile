# All commands of this project. You need make and Python 3.11 or newer; no root and no database.
.DEFAULT_GOAL := help
.PHONY: help run demo test test-long lint faults bench replay screenshots lock clean FORCE
SHELL := /bin/sh

VENV := .venv
BIN := $(VENV)/bin
# Processes of a test run: more than two cores have, since tests also wait.
WORKERS := 4
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all:
# The newest suitable Python on the PATH, unless you set PYTHON.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo $$p; break; }; done)

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

run: $(VENV)/run.stamp ## serve on 127.0.0.1:8080 with an embedded PostgreSQL (ORDER_TRACKING_* settings apply)
	@exec $(BIN)/order-tracking serve

demo: $(VENV)/run.stamp ## simulate Komerce against a temporary service; Ctrl-C removes it and its data
	@# Ctrl-C does not reach the service: it still runs when the simulator reads the log for its account. The port is any
	@# free one, since `make run` may hold the usual one.
	@dir=$$(mktemp -d) && chmod 711 "$$dir" && : >"$$dir/.env" && : >"$$dir/log" || exit 1; \
	export ORDER_TRACKING_STATE_DIR="$$dir" ORDER_TRACKING_ENV_FILE="$$dir/.env" ORDER_TRACKING_DATABASE_URL= \
		ORDER_TRACKING_WEBHOOK_TOKENS= ORDER_TRACKING_WEBHOOK_HMAC_SECRET= \
		ORDER_TRACKING_HOST= ORDER_TRACKING_TRUSTED_PROXIES= ORDER_TRACKING_LOG_FORMAT= \
		ORDER_TRACKING_PORT="$${ORDER_TRACKING_PORT:-0}"; \
	$(BIN)/python -c 'import os, sys; os.setpgrp(); os.execv(sys.argv[1], sys.argv[1:])' \
		$(BIN)/order-tracking serve >"$$dir/log" 2>&1 & pid=$$!; \
	trap 'trap "" INT TERM HUP; kill $$pid 2>/dev/null; wait $$pid; rm -rf "$$dir"' EXIT; \
	trap 'exit 0' INT TERM HUP; \
	until url=$$(sed -n 's/^order-tracking is listening on //p' "$$dir/log") && [ -n "$$url" ]; do \
		kill -0 $$pid 2>/dev/null || { cat "$$dir/log" >&2; exit 1; }; sleep 0.1; done; \
	echo "open $$url/ to watch the simulated orders; press Ctrl-C to stop"; \
	$(BIN)/order-tracking simulate --url "$$url/webhook" --orders 300 --rate 5 --duplicates 0.05 --reorder 0.05 \
		--delay 0.02 --hang-up 0.02 --unknown 0.01 $(ARGS) && result="all orders are simulated" || result="the simulator failed"; \
	echo "$$result; the service keeps running at $$url/ until you press Ctrl-C"; wait $$pid

test: $(VENV)/dev.stamp ## run the tests against a real PostgreSQL, with coverage
	@rm -f .coverage .coverage.*
	$(BIN)/python -m coverage run -m pytest $(or $(ARGS),--numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder --durations=10)
	@$(BIN)/python -m coverage combine -q
	@# Branches too. A selection of tests (ARGS) is not compared with these.
	@[ -n "$(ARGS)" ] || $(BIN)/python -m coverage report --include='domain/*' --fail-under=100
	@[ -n "$(ARGS)" ] || $(BIN)/python -m coverage report --include='projections/*,service/*' --fail-under=90

test-long: $(VENV)/dev.stamp ## run the long tests: every fault, a million orders, thousands of examples
	$(BIN)/python -m pytest -m long --durations=0 $(ARGS)
	@[ -n "$(ARGS)" ] || TEST_EXAMPLES=5000 $(BIN)/python -m pytest --numprocesses=2 tests/unit

lint: $(VENV)/dev.stamp ## check style, types, imports, prose and known vulnerabilities
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/python -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'
	$(BIN)/python -m tests.support.prose
	$(BIN)/python -m bandit --quiet --configfile pyproject.toml --recursive domain projections service
	$(BIN)/python -m tests.support.audit

faults: $(VENV)/dev.stamp ## break the service in every known way under load, and check that nothing is lost
	@$(BIN)/python -m tests.faults $(ARGS)

bench: $(VENV)/dev.stamp ## measure against the named baselines and print the ratios
	@$(BIN)/python -m tests.benchmarks $(ARGS)

replay: $(VENV)/run.stamp ## rebuild every view from the log and swap them in
	@exec $(BIN)/order-tracking replay $(ARGS)

screenshots: $(VENV)/dev.stamp ## make the README's pictures again (needs Chromium)
	@$(BIN)/python -m tests.support.screenshots

lock: ## pin the newest versions that pyproject.toml allows, with hashes (needs uv and npm)
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		--group installer -o requirements.lock pyproject.toml
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		-c requirements.lock --group installer --group dev -o requirements-dev.lock pyproject.toml
	@# Programs for `make test-long` alone: those that check the OpenAPI document, and Patroni.
	cd tests/support/contract && uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header \
		--no-annotate -o requirements.lock requirements.in
	cd tests/support/patroni && uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header \
		--no-annotate -o requirements.lock requirements.in
	cd tests/support/contract && rm -f package-lock.json && npm install --package-lock-only --no-audit --no-fund

clean: ## remove the virtual environment and caches; never your data
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
		echo "no Python 3.11 or newer is on the PATH: install one, or run make PYTHON=/path/to/python3.12" >&2; exit 1; fi
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { echo "$(PYTHON) does not exist: set PYTHON to a Python 3.11 or newer" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is too old: run make PYTHON=... with Python 3.11 or newer" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "$(PYTHON) has no venv: install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@# If its Python was moved or removed, the environment is useless.
	@if [ -d $(VENV) ] && ! $(BIN)/python -c pass 2>/dev/null; then rm -rf $(VENV); fi
	@[ -x $(BIN)/python ] || "$(PYTHON)" -m venv $(VENV)
	@echo "installing the packages of $(LOCK)"
	@# First the lock's pip, by the one that came with Python; then it installs everything else.
	@sed -n '/^pip==/,/[^\]$$/p' $(LOCK) >$(VENV)/pip.lock
	@$(PIP_INSTALL) -r $(VENV)/pip.lock && $(PIP_INSTALL) -r $(LOCK) || { \
		echo "the packages of $(LOCK) could not be installed, see above; on a platform without their wheels, use" >&2; \
		echo "pip without --only-binary, and set ORDER_TRACKING_DATABASE_URL to your own PostgreSQL" >&2; exit 1; }
	@# It finds the clone by its own path, and imports nothing from the current folder.
	@printf '%s\n' '#!/bin/sh' 'self=$$(readlink -f "$$0" 2>/dev/null || echo "$$0")' \
		'clone=$$(cd "$$(dirname "$$self")/../.." && pwd) || exit 1' \
		'PYTHONPATH="$$clone" exec "$$clone/.venv/bin/python" -P -m service "$$@"' > $(BIN)/order-tracking
	@chmod +x $(BIN)/order-tracking
