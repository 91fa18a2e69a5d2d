# `make demo` and `make test` do all their own set-up: a virtual environment in .venv, exact versions from constraints.txt.
SHELL := /bin/bash
VENV := .venv
PYTHON := $(VENV)/bin/python
DEMO := build/demo
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: demo test test-faults test-cluster test-docs lint types setup golden outage benchmark-quick clean
.DELETE_ON_ERROR:

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "== setting up $(VENV) (about two minutes)"
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	@echo "== 1/5 archives in ILSVRC's layout, generated"
	$(PYTHON) -m data_prep.demo --out $(DEMO)/archives
	@echo "== 2/5 archives → shards"
	$(PYTHON) -m data_prep.ilsvrc $(DEMO)/archives --out $(DEMO)/data
	@echo "== 3/5 what the network sees"
	$(PYTHON) jobs/contact_sheet.py resnet18_64px --data $(DEMO)/data --out $(DEMO)/contact_sheet.png
	@echo "== 4/5 a campaign: three networks trained on Ray, tested, averaged, submitted; recorded in MLflow"
	MLFLOW_TRACKING_URI=sqlite:///$(CURDIR)/$(DEMO)/mlflow.db $(PYTHON) jobs/campaign.py demo \
		--data $(DEMO)/data --storage $(DEMO)/campaigns --name demo
	@echo "== 5/5 the paper's tables and figures, and beside them what has been run"
	$(PYTHON) jobs/report.py --storage $(DEMO)/campaigns --out $(DEMO)/report --tracking-uri sqlite:///$(CURDIR)/$(DEMO)/mlflow.db
	@echo "== done: everything lies in $(DEMO). The same command finds all of it finished; 'make clean' starts afresh."

test: lint types
	@echo "== tests (REAL_DATA=$${REAL_DATA:-, so tests on real images are skipped})"
	OMP_WAIT_POLICY=passive $(PYTHON) -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

FAULT_SEEDS ?= 5
test-faults: setup
	@echo "== every class of fault over $(FAULT_SEEDS) seeds (FAULT_SEEDS=…; a part of it, with one seed, is in 'make test')"
	FAULT_SEEDS=$(FAULT_SEEDS) $(PYTHON) -m pytest tests/training/test_exactness.py tests/training/test_kills.py tests/training/test_writes.py \
		tests/training/test_worlds.py tests/training/test_failing_store.py tests/control/test_faults.py \
		tests/control/test_elastic.py tests/control/test_worker_log.py tests/jobs/test_rehearse.py tests/jobs/test_campaign.py --timeout 1800 --session-timeout 14400

test-cluster: setup
	@echo "== a real SLURM of two nodes, two hosts in network namespaces, Ray heads (Debian packages slurm-wlm munge iproute2; root)"
	command -v slurmctld >/dev/null || PATH=$$PATH:/usr/sbin command -v slurmctld >/dev/null || apt-get install --yes slurm-wlm munge
	command -v ip >/dev/null || apt-get install --yes iproute2
	TEST_CLUSTER=1 $(PYTHON) -m pytest tests/cluster --timeout 1200 --session-timeout 7200

test-docs: setup
	@echo "== every command of the README and the pages, on a machine of its own (half an hour; root; some are in 'make test')"
	command -v slurmctld >/dev/null || PATH=$$PATH:/usr/sbin command -v slurmctld >/dev/null || apt-get install --yes slurm-wlm munge
	command -v ip >/dev/null || apt-get install --yes iproute2
	command -v prometheus >/dev/null || apt-get install --yes --no-install-recommends prometheus
	TEST_DOCS=1 $(PYTHON) -m pytest tests/docs --timeout 1200 --session-timeout 7200

lint: setup
	@echo "== lint"
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: setup
	@echo "== types"
	$(VENV)/bin/mypy

outage: setup
	@echo "== an S3 server that fails one request in twenty, and is away for a minute (a small form is in 'make test')"
	OUTAGE_S=60 $(PYTHON) -m pytest tests/test_remote.py tests/jobs/test_s3.py --timeout 900 --session-timeout 7200

benchmark-quick: setup
	@echo "== a few ratios beside the committed ones (a minute; what is much worse is told, nothing fails of it)"
	$(PYTHON) -m benchmarks.ratios

golden: setup
	@echo "== golden losses of this tree against the parent commit"
	$(PYTHON) -m tests.golden --against HEAD~1

clean:
	rm -rf build
