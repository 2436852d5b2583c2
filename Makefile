# The commands of the workbook. `make` alone lists them.
# All of them work without an active environment: the first one makes .venv.

# The Python that makes .venv: 3.11 or newer.
PYTHON ?= python3

# The Python of `make test-colab`; Colab has 3.13.
COLAB_PYTHON ?= python3.13

# What `make workbook` runs. These values are the demo, in which nothing is downloaded.
WEIGHTS ?= stand-in
DATASET ?= phantom
RECIPE  ?= demo
STUDY   ?= workbook
# The device of `make test-gpu`.
DEVICE ?= cuda
# Runs at a time, each on one thread; test files at a time.
WORKERS ?= 2

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
OUT := runs/$(STUDY)
COMMA := ,
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
failed = [f"{len(part)} of {len(runs)}, first {' '.join(map(str, part[[*grid]].iloc[0]))}: {error}"
          for error, part in runs[runs["error"] != ""].groupby("error", sort=False)]
sys.exit("\n".join(["Failed:", *failed]) if failed else 0)
endef
export GRID

.PHONY: help workbook lab html test test-network test-gpu test-browser test-colab bench faults badges figures clean grid

help:
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / {printf "make %-13s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "make workbook WEIGHTS=$(WEIGHTS) DATASET=$(DATASET) RECIPE=$(RECIPE) STUDY=$(STUDY) WORKERS=$(WORKERS)"
	@echo "are the defaults, a demo. The README says what else they can be."

# 04 and 05 need the grid's runs; 02 runs beside the grid, and so do 06 and 07 in a demo, one after
# another, so that no core waits. Real ones come after it: they would take the GPU's memory from it.
# The parameters that each is given:
GIVE_01 := -r weights "$(WEIGHTS)"
GIVE_02 := -r weights "$(WEIGHTS)"
# Notebooks run in their own folder, so a folder of images is named from the root.
DATA = $(shell d="$(DATASET)"; [ ! -e "$$d" ] || [ "$${d#/}" != "$$d" ] || printf "%s/" "$(CURDIR)"; \
    printf "%s" "$$d")
# 04 looks at the grid that has just run, so it trains nothing.
ANY_DEMO := $(filter stand-in,$(WEIGHTS))$(filter phantom,$(DATASET))$(filter demo,$(RECIPE))
METHODS := random, BYOL, SwAV, MoCo, SparK
GIVE_04 = -r weights "$(WEIGHTS)" -r recipe "$(RECIPE)" -r study "$(STUDY)" -y "{datasets: \
    ['$(DATA)'], methods: [$(METHODS)$(if $(ANY_DEMO),,$(COMMA) ImageNet)], seeds: [0, 1], \
    epochs: 0, image_size: 0}"
GIVE_05 := -r study_dir "../$(OUT)"
GIVE_06 = -r weights "$(WEIGHTS)" -r dataset "$(DATA)" -r recipe "$(RECIPE)"
GIVE_07 := -r weights "$(WEIGHTS)"
DEMO := $(filter stand-in_phantom_demo,$(WEIGHTS)_$(DATASET)_$(RECIPE))
BESIDE := 06_look_inside 07_use_your_own_data
AFTER := 04_run_study 05_compare_results

workbook: $(READY)  ## run all notebooks into runs/STUDY, from the checkpoints to the comparison
	@mkdir -p "$(OUT)"
	@$(MAKE) --no-print-directory -j "$(WORKERS)" $(BESIDE:%=run-%) $(AFTER:%=run-%)
	@echo "Done. Read $(OUT)/05_compare_results.ipynb first: which method wins, and is it noise?"
	@echo "Each folder in $(OUT) is one run: its notebook.ipynb, its scores in metrics.json."
	@echo "\`make lab\` opens the notebooks."

grid: run-01_download_checkpoints
	OMP_NUM_THREADS=1 $(PY) -c "$$GRID" \
	    "$(WEIGHTS)" "$(DATASET)" "$(RECIPE)" "$(STUDY)" "$(WORKERS)"

run-02_load_and_check_keys: run-01_download_checkpoints
$(BESIDE:%=run-%): run-02_load_and_check_keys $(if $(DEMO),,grid)
$(AFTER:%=run-%): grid

run-%: $(READY)
	OMP_NUM_THREADS=1 $(NOTEBOOK) "notebooks/$*.ipynb" "$(OUT)/$*.ipynb" \
	    $(GIVE_$(firstword $(subst _, ,$*)))

# Not by the file's name: Lab would take notebooks/ for its root, and runs/ could not be opened.
lab: $(READY)  ## open JupyterLab
	$(PY) -m jupyterlab --LabApp.default_url=/lab/tree/notebooks/01_download_checkpoints.ipynb

html: $(READY)  ## write the executed notebooks as linked web pages into runs/html
	$(PY) .ci/pages.py . "$(STUDY)"

figures: $(READY)  ## write the README's pictures from the notebooks' outputs
	$(PY) .ci/figures.py

test: $(READY)  ## run all tests, the notebooks included, without network
	OMP_NUM_THREADS=1 $(PY) -m pytest -n "$(WORKERS)" --dist loadfile

test-network: $(READY)  ## check the addresses of the published checkpoints
	$(PY) -m pytest -m network

test-gpu: $(READY)  ## run the tests that need a GPU
	DEVICE="$(DEVICE)" $(PY) -m pytest -m gpu -rs tests/test_gpu.py

test-browser: $(READY)  ## run every notebook in JupyterLab in headless Chromium
	OMP_NUM_THREADS=1 $(PY) -m pytest -m browser -rs tests/test_browser.py

test-colab: $(READY)  ## run every notebook with Colab's package versions, in .venv-colab
	"$(COLAB_PYTHON)" -m venv --clear .venv-colab
	.venv-colab/bin/python -m pip install --disable-pip-version-check -q --only-binary :all: -r .ci/colab.txt
	$(PY) .ci/colab.py .venv-colab/bin/python

bench: $(READY)  ## run the benchmarks
	@set -e; for script in $(filter-out bench/faults%.py,$(wildcard bench/*.py)); do \
	    echo "== $$script"; $(PY) "$$script"; done

faults: $(READY)  ## damage downloads, checkpoints and images, and print what happens
	$(PY) bench/faults.py
	$(PY) bench/faults_data.py

badges: $(READY)  ## write the Colab and Binder badges, from the address in pyproject.toml
	$(PY) .ci/badges.py

clean:  ## remove .venv and caches; runs, checkpoints and data stay
	rm -rf $(VENV) .venv-colab .pytest_cache *.egg-info
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
