# The one prerequisite: apt install make python3-venv  (Python 3.11 or newer)
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
TYPED := build/typed
PYTEST_ARGS ?=

# the checkout's kernels/ must never be found as a top-level module by `python -m`
export PYTHONSAFEPATH = 1

.PHONY: run test check format tables gpu-suite gpu-rows clean

# the main job: prune the built-in model, recover, export, evaluate, report
run: $(INSTALLED)
	$(BIN)/compress run recipes/ddpm_gradflow.yaml --overwrite

test: $(INSTALLED)
	$(BIN)/pytest -n 2 $(PYTEST_ARGS)

# mypy and lint-imports look for compress.eval inside compress/: they get a tree where it lies there
check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/deptry compress eval kernels recipes
	@rm -rf $(TYPED) && mkdir -p $(TYPED)/compress
	@ln -s $(CURDIR)/compress/* $(CURDIR)/eval $(CURDIR)/kernels $(CURDIR)/recipes $(TYPED)/compress/
	cd $(TYPED) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p compress
	cd $(TYPED) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --allow-untyped-defs --no-warn-unused-ignores $(CURDIR)/.ci/gpu/*.py
	cd $(TYPED) && $(CURDIR)/$(BIN)/lint-imports --no-logo --no-cache $(CURDIR)/pyproject.toml

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# the documents' tables, from the rows in eval/results; runs whatever is missing there (hours)
tables: $(INSTALLED)
	$(BIN)/compress tables --update eval/RESULTS.md --update README.md

# ten minutes on a machine with a GPU: see .ci/gpu/README.md
gpu-suite:
	.ci/gpu/collect .
	bash .gpu/run.sh

# make gpu-rows DIR=OUT: the suite's rows into eval/results; `make tables` shows them
gpu-rows:
	.ci/gpu/rows $(DIR)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("compress needs Python 3.11 or newer; name one: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[all,dev]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
