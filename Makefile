# Two commands matter: `make demo` and `make test`. Each sets up what it needs.
PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
# Where pip may find torch's CPU build, e.g. the CPU index from PyTorch's install page. Empty: pip's own choice.
TORCH_INDEX ?=
# Test processes side by side; two suit a laptop.
JOBS    ?= 2

.PHONY: setup demo demo-grpo test test-slow check torture bench docs layouts picture constraints clean help

help:  ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready  ## make .venv with everything pinned in constraints.txt

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Flash needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Setting up $(VENV) (about a minute; torch is the large part)"
	@$(BIN)/python tools/torch_build.py "$(TORCH_INDEX)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[train,dev,docs]' 2>&1 | grep -v '^WARNING: Location' || true
	@$(BIN)/python -c 'import torch, transformers, flash'
	@touch $@

demo: setup  ## push examples/arithmetic, train flash/nano on it by SFT, show base against adapter
	@$(BIN)/flash env push --name arithmetic examples/arithmetic
	@$(BIN)/flash train examples/arithmetic/sft.toml

demo-grpo: setup  ## the same by GRPO: from the reward alone, no worked answers
	@$(BIN)/flash env push --name arithmetic examples/arithmetic
	@$(BIN)/flash train examples/arithmetic/grpo.toml

test: setup  ## the tests (minutes, no services)
	@$(BIN)/pytest -m "not slow and not gpu" -n $(JOBS) --dist loadfile

test-slow: setup  ## the tests that need services, a browser, or minutes
	@$(BIN)/pytest -m "slow and not gpu" -n $(JOBS) --dist loadfile --timeout 900

check: setup  ## lint, types, import directions
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

torture: setup  ## faults by the thousand, hours: the table of docs/reliability.md (ROWS="--row sft" for one)
	@$(BIN)/python -m torture --write $(ROWS)

bench: setup  ## side by side with peers, which get a virtual environment of their own
	@$(BIN)/python benchmarks/run.py

docs: setup  ## refresh the pages that are generated from code, and build the site into site/
	@$(BIN)/python docs/generate.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "site/index.html"

layouts: setup  ## run the tests of every model layout and record in docs/layouts.json what they prove
	@$(BIN)/python docs/layout_table.py && $(BIN)/python docs/generate.py

picture: setup  ## record the README's picture anew: trains examples/arithmetic once
	@$(BIN)/python docs/picture.py

screenshots: setup  ## take the pictures of docs/dashboard.md anew, in this machine's Chromium
	@$(BIN)/python docs/screenshots.py

constraints: setup  ## record this environment's exact versions
	@$(BIN)/pip freeze --exclude-editable --disable-pip-version-check | sed -e 's/+cpu$$//' -e '/ @ /d' > constraints.txt

clean:  ## remove the virtual environments
	@rm -rf $(VENV) .venv-*
