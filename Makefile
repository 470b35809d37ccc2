# `make demo` and `make test` need no other set-up: each makes .venv if it is missing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all test-cluster test-sky test-clients soak sky-e2e fuzz lint clean

demo: .venv/ready
	$(BIN)/fastft demo

# What a change should pass before it is committed: all but the slow tests, in under 8 minutes on two cores. Three workers for
# two cores, because a quarter of the tests' time is waiting: for signals, limits and servers.
test: .venv/ready lint
	$(BIN)/python -m pytest -n 3 --dist worksteal -m "not slow"

test-all: .venv/ready lint
	$(BIN)/python -m pytest -n 3 --dist worksteal

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The pinned set; torch 2.13.0 comes as a CPU build where the package index offers one.
.venv/ready: setup.cfg constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test]" --constraint constraints.txt
	touch $@

# The cleaner on a real Ray cluster of one machine.
test-cluster: .venv/ready
	$(BIN)/python -m pip install --quiet --editable ".[cluster]" --constraint constraints.txt
	$(BIN)/python -m pytest tests/cleaning/test_cluster.py

# The real SkyPilot reads sky_yamls/. It has its own environment: it needs an older click than the pinned set.
test-sky: .venv-sky/ready
	.venv-sky/bin/python tests/sky/validate.py

.venv-sky/ready:
	rm -rf .venv-sky
	$(PYTHON) -m venv .venv-sky
	.venv-sky/bin/python -m pip install --quiet skypilot==0.14.1
	touch $@

# Real clients and fleets before a real `fastft serve`, each in an environment of its own under .venv-clients/, which the first run
# makes: half an hour and 10 GB. Clients of Node are left out where it is not installed, Open WebUI where chromium is not.
test-clients: .venv/ready
	$(BIN)/python -m pytest tests/clients/real_clients.py tests/clients/fleet.py tests/clients/open_webui.py

# `fastft serve` for half an hour at 80 % of what it can do; for a nightly run.
soak: .venv/ready
	$(BIN)/python benchmarks/serve_faults.py --soak_minutes 30

# A managed job of the real SkyPilot on a Slurm cluster of one machine, preempted twice. Needs Linux, root and Debian's packages;
# takes 10 minutes.
sky-e2e: .venv/ready .venv-sky-e2e/ready
	.venv-sky-e2e/bin/python tests/sky/e2e.py

.venv-sky-e2e/ready:
	rm -rf .venv-sky-e2e
	$(PYTHON) -m venv .venv-sky-e2e
	.venv-sky-e2e/bin/python -m pip install --quiet "skypilot[slurm]==0.14.1" uv
	touch $@

# Fuzzes the HTML converter, guided by coverage, for FUZZ_SECONDS (60).
fuzz:
	PYTHON=$(PYTHON) tests/fuzz/run

clean:
	rm -rf .venv .venv-sky .venv-sky-e2e .venv-fuzz .venv-clients build *.egg-info
