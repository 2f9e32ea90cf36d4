# make quickstart   installs, trains the three networks on phantoms, reports
# make test         installs, checks style and types, runs the tests
# make parity       tests the published networks, against their PyTorch peers
# make study        compares the methods on phantoms, with seeds (hours)
# PYTHON=python3.12 chooses another interpreter.

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV := .venv
READY := $(VENV)/ready-$(VERSION)
TESTING := $(VENV)/testing-$(VERSION)
PARITY := $(VENV)/parity-$(VERSION)

.PHONY: install quickstart study test parity lint clean

install: $(READY)

$(READY): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is $(VERSION)" if sys.version_info < (3, 11) else 0)'
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --no-compile -c constraints.txt -e .
	touch $@

$(TESTING): $(READY)
	$(VENV)/bin/pip install --quiet --no-compile -c constraints.txt -e '.[test]'
	touch $@

$(PARITY): $(TESTING)
	$(VENV)/bin/pip install --quiet --no-compile -c constraints.txt -e '.[test,parity]'
	touch $@

quickstart: install
	$(VENV)/bin/python launch/train.py --config configs/phantom.py \
	  --workdir runs/quickstart

# Two starts share the runs, each on a core of its own where that can be asked.
study: install
	@pin() { taskset -c $$1 true 2>/dev/null && echo "taskset -c $$1"; }; \
	start="$(VENV)/bin/python launch/study.py --workdir runs/study"; \
	$$(pin 0) $$start & one=$$!; $$(pin 1) $$start & two=$$!; \
	trap "kill $$one $$two" INT TERM; \
	wait $$one && wait $$two; status=$$?; wait; exit $$status

lint: $(TESTING)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: lint
	$(VENV)/bin/python -m pytest tests --ignore=tests/parity

parity: lint $(PARITY)
	$(VENV)/bin/python -m pytest tests/parity

clean:
	rm -rf $(VENV)
