# The commands of the workbook. Each works without an active environment: the first makes .venv.
PYTHON ?= python3
COLAB_PYTHON ?= python3.13
DEVICE ?= cuda
WORKERS ?= 2
PY := .venv/bin/python
READY := .venv/.installed
# A prepared file is named as seen from here; the notebooks run one folder deeper.
DATA := $(shell [ -f "./$(DATASET)" ] && printf ../)$(DATASET)
GIVEN := $(if $(WEIGHTS),"weights=$(WEIGHTS)") $(if $(DATASET),"dataset=$(DATA)") \
    $(if $(RECIPE),"recipe=$(RECIPE)")

.PHONY: help workbook lab test bench test-gpu test-browser test-colab clean
help:
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / {printf "make %-13s %s\n", $$1, $$2}' Makefile

workbook: $(READY)  ## run the seven notebooks; WEIGHTS=, DATASET=, RECIPE= go where they are known
	@mkdir -p runs/notebooks
	@set -e; for notebook in notebooks/0*.ipynb; do \
	    set --; \
	    for given in $(GIVEN); do name=$${given%%=*}; \
	        if grep -q "\"$$name: str" "$$notebook"; then set -- "$$@" -r "$$name" "$${given#*=}"; fi; \
	    done; \
	    echo "== $$notebook $$*"; \
	    OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m papermill --cwd notebooks --no-progress-bar "$$notebook" "runs/$$notebook" "$$@"; \
	done
	@echo "Done. Read runs/notebooks/06_compare_results.ipynb first; \`make lab\` opens the notebooks."

lab: $(READY)  ## open JupyterLab
	$(PY) -m jupyterlab --LabApp.default_url=/lab/tree/notebooks/01_download_checkpoints.ipynb

test: $(READY)  ## check the style and run all tests, the notebooks included, without network
	$(PY) -m ruff format --check -q && $(PY) -m ruff check -q
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) --dist loadfile

bench: $(READY)  ## run the benchmarks
	@set -e; for script in bench/*.py; do echo "== $$script"; $(PY) "$$script"; done

test-gpu: $(READY)  ## run the tests that need a GPU
	DEVICE=$(DEVICE) $(PY) -m pytest -m gpu -rs

test-browser: $(READY)  ## run every notebook in JupyterLab in headless Chromium
	OMP_NUM_THREADS=1 $(PY) -m pytest -m browser -rs

test-colab: $(READY)  ## run every notebook with Colab's package versions, in .venv-colab
	$(COLAB_PYTHON) -m venv --clear .venv-colab
	.venv-colab/bin/python -m pip install -q --disable-pip-version-check -r tests/colab.txt
	$(PY) -m pytest -m colab -rs -s

clean:  ## remove the environments; runs, checkpoints and data stay
	rm -rf .venv .venv-colab .pytest_cache .ruff_cache *.egg-info

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Python 3.11 or newer is needed: make test PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check -e ".[test]"
	@$(PY) -c 'import torchvision' || { echo "torch and torchvision come from two sources: look at" \
	    "\`pip config list\`, run \`make clean\`, try again."; exit 1; }
	@touch $(READY)
