# The commands of the workbook. `make` alone lists them.
# All of them work without an active environment: the first one makes .venv.

# The Python that makes .venv: 3.11 or newer.
PYTHON ?= python3

# What `make workbook` runs. These values are the demo, in which nothing is downloaded.
WEIGHTS ?= stand-in
DATASET ?= phantom
RECIPE  ?= demo
STUDY   ?= workbook
# Runs at a time, each on one thread.
WORKERS ?= 2

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
OUT := runs/$(STUDY)
# Below, -r passes a value as text: a study named 2024 stays a name.
NOTEBOOK := $(PY) -m papermill --cwd notebooks --no-progress-bar

# The grid of notebook 03: every initialisation, two label fractions, two seeds.
# ImageNet weights are a download, so a demo goes without them.
define GRID
import sys
import medssl_utils as medssl

weights, dataset, recipe, study, workers = sys.argv[1:]
real = weights == "published" and dataset != "phantom" and recipe != "demo"
grid = {
    "method": ["random", *medssl.METHODS, *(["ImageNet"] if real else [])],
    "label_fraction": [0.25, 1.0],
    "seed": [0, 1],
}
runs = medssl.run_study(
    grid, workers=int(workers), progress="log", notebook="notebooks/03_fine_tune.ipynb",
    weights=weights, dataset=dataset, recipe=recipe, study=study,
)
failed = runs[runs["error"] != ""]
sys.exit("\n".join(["Failed:", *failed["error"]]) if len(failed) else 0)
endef
export GRID

.PHONY: help workbook lab test test-network bench faults badges clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /make \1	/p' Makefile

workbook: $(READY)  ## run the notebooks into runs/workbook, from the checkpoints to the comparison
	@mkdir -p "$(OUT)"
	$(NOTEBOOK) notebooks/01_download_checkpoints.ipynb "$(OUT)/01_download_checkpoints.ipynb" \
	    -r weights "$(WEIGHTS)"
	$(NOTEBOOK) notebooks/02_load_and_check_keys.ipynb "$(OUT)/02_load_and_check_keys.ipynb" \
	    -r weights "$(WEIGHTS)"
	OMP_NUM_THREADS=1 $(PY) -c "$$GRID" \
	    "$(WEIGHTS)" "$(DATASET)" "$(RECIPE)" "$(STUDY)" "$(WORKERS)"
	OMP_NUM_THREADS=1 $(NOTEBOOK) notebooks/04_run_study.ipynb "$(OUT)/04_run_study.ipynb"
	$(NOTEBOOK) notebooks/05_compare_results.ipynb "$(OUT)/05_compare_results.ipynb" \
	    -r study_dir "../$(OUT)"
	@echo "Done. Read $(OUT)/05_compare_results.ipynb first: which method wins, and is it noise?"
	@echo "Each folder in $(OUT) is one run: its notebook.ipynb, its scores in metrics.json."
	@echo "\`make lab\` opens the notebooks."

lab: $(READY)  ## open JupyterLab
	$(PY) -m jupyterlab notebooks/01_download_checkpoints.ipynb

test: $(READY)  ## run all tests, the notebooks included; needs no network
	OMP_NUM_THREADS=1 $(PY) -m pytest

test-network: $(READY)  ## check the addresses of the published checkpoints
	$(PY) -m pytest -m network

bench: $(READY)  ## run the benchmarks
	@set -e; for script in $(filter-out bench/faults%.py,$(wildcard bench/*.py)); do \
	    echo "== $$script"; $(PY) "$$script"; done

faults: $(READY)  ## print what happens at each fault: downloads, checkpoints, images
	$(PY) bench/faults.py
	$(PY) bench/faults_data.py

badges: $(READY)  ## write the Colab and Binder badges, from the address in pyproject.toml
	$(PY) .ci/badges.py

clean:  ## remove .venv and caches; runs, checkpoints and data stay
	rm -rf $(VENV) .pytest_cache *.egg-info
	find . \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# torch and torchvision must come from one source, which shows only at import.
$(READY): pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Python 3.11 or newer is needed; $(PYTHON) is not." ; \
	    echo "Name another one: make workbook PYTHON=python3.12"; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check -e ".[test]"
	@$(PY) -c 'import torch, torchvision as tv; tv.ops.nms(torch.ones(1, 4), torch.ones(1), 0.5)' || { \
	    echo "torch and torchvision do not fit together: they come from different sources." ; \
	    echo "Let pip use one source (unset PIP_FIND_LINKS and PIP_EXTRA_INDEX_URL, look at" ; \
	    echo "\`pip config list\`), run \`make clean\`, and try again."; exit 1; }
	@touch $(READY)
