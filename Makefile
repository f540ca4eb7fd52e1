# Two commands do everything: `make run` and `make test`. Both set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
GUESTS := PYTHONPATH=vm $(PYTHON) -m kernelguest

.DEFAULT_GOAL := help
.PHONY: help agent run plan test test-modes conform conform-live torture lint test-deps bench clean

help: ## Say what there is to make
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' Makefile | expand -t 20

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,demo]'
	touch $(READY)

agent: ## Compile the part of a client that is C, if a source of it changed
	@$(MAKE) --silent --no-print-directory -C csrc

run: $(READY) agent ## Start four real workers with the same data, and let them hold it once while they work
	$(BIN)/pagefold run --knob run=0 -- $(BIN)/python examples/run_workers.py

plan: $(READY) agent ## Start five real workers, four with the same data, and plan their memory
	$(BIN)/python examples/plan_workers.py

test: $(READY) agent ## Run the whole test suite
	$(BIN)/python -m pytest

# Live merging is left out there: its daemons are processes of their own, and what is compiled in them is tested without them.
test-modes: $(READY) agent ## Run it uncompiled, and compiled with bounds checks
	NUMBA_DISABLE_JIT=1 $(BIN)/python -m pytest -q -m "not guest" --ignore=tests/live --ignore=tests/cli/test_live_commands.py
	NUMBA_BOUNDSCHECK=1 $(BIN)/python -m pytest -q -m "not guest" --ignore=tests/live --ignore=tests/cli/test_live_commands.py

conform: $(READY) agent ## Compare the engine with real kernels: all scenarios, and 300 random sequences on each
	$(BIN)/pagefold conform
	$(BIN)/pagefold conform --host sim,guest --nodes 4
	PAGEFOLD_CONFORM=all $(BIN)/python -m pytest -q tests/conformance/test_random.py

conform-live: $(READY) agent ## Merge live on two NUMA nodes, in a guest, whose slots and pages migrate
	PAGEFOLD_CONFORM=live $(BIN)/python -m pytest -q -rA -m nightly tests/live/test_two_nodes.py

# All kinds at once make fewer windows: the second half is for their number.
torture: agent ## Write to memory in every way while it merges: an hour, or SECONDS
	$(MAKE) --silent -C tests/torture
	tests/torture/build/torture --seconds $$(($(or $(SECONDS),3600) / 2))
	tests/torture/build/torture --seconds $$(($(or $(SECONDS),3600) / 2)) --kinds store,read,look,fork,forkmerge

lint: $(READY) ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-deps: ## Install system packages that some tests need (Debian, root); without them those tests say that they skip
	@if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	apt-get update -qq && apt-get install -y -qq --no-install-recommends gdb $$($(GUESTS) packages) && $(GUESTS) fetch; \
	else echo "test-deps: this is not Debian, or you are not root: install gdb (for gcore) and QEMU by hand"; fi

bench: $(READY) agent ## Measure, against the kernel, in one run
	$(BIN)/python benchmarks/engine_scan.py
	$(BIN)/python benchmarks/plan_read.py
	$(BIN)/python benchmarks/live_merge.py
	$(BIN)/python benchmarks/start_up.py

clean: ## Remove what was made
	rm -rf tests/torture/build src/pagefold/live/*.so $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
