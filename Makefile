# make setup, demo, pictures, test, thorough, check, bench, evaluate, ablation, changes: each works alone on a fresh clone.
# The CPU build of torch is taken unless nvidia-smi finds a GPU; TORCH=cpu or TORCH=cuda decides otherwise.
# Where pip's own index serves the CUDA build under that version, TORCH_INDEX names an index with CPU builds.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
PYTEST_ARGS ?=
# Two processes of one thread each, a file's tests in one of them and in their order.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(or $(WORKERS),2) --dist loadfile --no-loadscope-reorder
PACK ?= ../shared/data/kaokore256.zip
WEIGHTS := src/mambastyle/weights/kaokore64
# Methods that optimise take seconds to a minute a face: they get the first so many of the test faces.
EVALUATE_COUNT ?= 16
EVALUATE_METHODS ?= optimise pti encoder+optimise mean-w
# Other encoders beside the preset: NAME=FOLDER, such as W+-only=recipes/weights/inversion-kaokore64-w.
EVALUATE_ALSO ?=
ABLATION_STEPS ?= 1800
ABLATION_SEEDS ?= 0 1
ABLATION ?= final base vit no-fuser no-le no-ss2d w-plus
CHANGES ?= strength-4 edit-all real-75 perceptual-double rate-double
# The ablation's own: the preset's are learned through the preset's encoder.
BOUNDARIES := recipes/weights/directions-kaokore64.safetensors

ifeq ($(TORCH),cpu)
PIP_TORCH := --constraint constraints-cpu.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
endif

.PHONY: setup demo pictures test thorough check format bench evaluate ablation changes clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_TORCH) --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/mambastyle demo --out out/demo

# The pictures of the README: the demo's sheets, and the page by the tests in a browser.
pictures: demo
	$(BIN)/python -c 'from mambastyle import images; \
		[images.write(f"docs/pictures/{new}.webp", images.fit(images.read(f"out/demo/{sheet}.png"), 1200), 85) \
		for new, sheet in (("demo-faces", "contact_sheet"), ("demo-styles", "style_sheet"))]'
	MAMBASTYLE_PICTURES=docs/pictures $(BIN)/python -m pytest tests/ui

test: $(STAMP)
	$(PYTEST) $(PYTEST_ARGS)

# The tests that take longer: exports, Ray, the wheel, killed processes.
thorough: $(STAMP)
	$(BIN)/python -m pytest -m thorough $(PYTEST_ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python benchmarks/verify.py

# Table 1's columns for the preset and the baselines on the test faces, then all methods on the same few.
evaluate: $(STAMP)
	$(BIN)/mambastyle evaluate paper --pack $(PACK) --judge $(WEIGHTS)/judge.safetensors --latents-alone \
		--method mean-w $(foreach model,$(EVALUATE_ALSO),--also $(model)) --report out/evaluate/encoders
	$(BIN)/mambastyle evaluate paper --pack $(PACK) --judge $(WEIGHTS)/judge.safetensors --count $(EVALUATE_COUNT) \
		$(foreach model,$(EVALUATE_ALSO),--also $(model)) $(foreach way,$(EVALUATE_METHODS),--method $(way)) \
		--keep-in out/evaluate/found --report out/evaluate/methods

# Trains what is missing, goes on with what was interrupted, then compares all of it.
train_each = set -e; for name in $(2); do for seed in $(ABLATION_SEEDS); do \
	$(BIN)/mambastyle train inversion recipes/$(1)/$$name.yaml -s name=ablation-$$name-$$seed -s seed=$$seed \
		-s steps=$(ABLATION_STEPS) -s restart_steps=$(ABLATION_STEPS); \
done; done
runs_of = $(foreach name,$(1),$(foreach seed,$(ABLATION_SEEDS),runs/ablation-$(name)-$(seed)))
compare = $(BIN)/mambastyle evaluate ablation $(1) --pack $(PACK) --judge $(WEIGHTS)/judge.safetensors \
	--directions $(BOUNDARIES) --report docs/tables/$(2)

ablation: $(STAMP)
	$(call train_each,ablation,$(ABLATION))
	$(call compare,$(call runs_of,$(ABLATION)),ablation)

# One change at a time to the ablation's recipe, beside Final's runs of `make ablation`.
changes: $(STAMP)
	$(call train_each,ablation,final)
	$(call train_each,changes,$(CHANGES))
	$(call compare,$(call runs_of,final $(CHANGES)),changes)

clean:
	rm -rf out build dist .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
