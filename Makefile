# make demo    see it work: a throwaway VM, live and non-live checkpoints, a revert
# make test    the whole gate: linters, types, all tests, on two real QEMUs
# make faults  the attacks alone, all of them: faults, kills, bad disks, power failures; an hour
# make soak    the same in its long form, which takes a day
# make bench   measure it: pauses, times and sizes, as ratios
# make clean   remove what these made
#
# Each prepares what it needs first. Any Python from 3.11 to 3.13 will do:
# make test PYTHON=python3.13

PYTHON ?= /usr/bin/python3
VENV := .venv
PYTEST := $(VENV)/bin/pytest --numprocesses=3 --dist=worksteal
ATTACKS := tests/faults tests/fuzz tests/crashes tests/attacks tests/soak tests/real/test_rescue.py

.PHONY: help prepare test faults soak demo bench clean

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

prepare: $(VENV)/.prepared
	@$(PYTHON) -m tests.parts

test: prepare
	$(PYTEST) -m "not alone"
	$(VENV)/bin/pytest -m alone

faults: prepare
	QSNAPD_ALL=1 $(PYTEST) -m "not alone" $(ATTACKS)

soak: prepare
	QSNAPD_LONG=1 $(PYTEST) -m "not alone" $(ATTACKS)
	$(VENV)/bin/python -m tests.fuzz --long

demo: prepare
	@$(VENV)/bin/python -m tests.demo

bench: prepare
	$(VENV)/bin/python -m tests.bench

clean:
	rm -rf .cache $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

# pip knows --group since 25.1
$(VENV)/.prepared: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	    { echo '$(PYTHON) must be Python 3.11 to 3.13; say make PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -m tests.parts venv $(VENV)
	@echo 'installing Python packages ...'
	@$(VENV)/bin/python -m pip install --quiet 'pip>=25.1'
	@$(VENV)/bin/python -m pip install --quiet --editable . --group dev --group fuzz
	@touch $@
