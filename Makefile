# One command for each thing a person does with the repository; .ci/run calls the same ones.
#
#   make demo    install, fetch SmolLM2-135M into models/ (without a network: the bundled model), then compress it, generate
#                side by side and print one table: four to six minutes on two cores
#   make test    install, then run the tests
#   make test-fallback   install, then run what attends on a CPU without the compiled kernels, as where there is no C++ compiler
#   make test-lm-eval   install lm-evaluation-harness as well, then run the tests of docs/lm-eval.md
#   make check   install, then lint, format, types and import layers
#   make bench   install, then measure decoding speed (a quarter of an hour on two cores, on a quiet machine), and fill
#                docs/decode-speed.md; what is measured already is kept. PEERS=1 installs hqq and quanto to compare with
#   make results what docs/results lacks of every suite of benchmarks/quality on SmolLM2-135M and Qwen2.5-Coder-1.5B (a day
#                on two cores, row by row: it can be interrupted), then the tables and figures of the pages.
#                MODELS=smollm2 SUITES=texts picks; RESULTS=outputs/results measures anew, and holds that against docs/results
#   make test-kvpress   the tests that need kvpress, in an environment of its own with an older transformers
#   make test-vllm   the tests that need vLLM, in an environment of its own with an older transformers: vLLM's CPU build, or
#                on a machine with an NVIDIA GPU the usual one. VLLM_PYTEST_ARGS="-k export" picks some of them; under
#                CSKV_LOAD_SECONDS=10 the server is under load for so long, not for a minute
#   make venv    install only. With a C++ compiler that builds the CPU kernels, too, and again when they are edited;
#                CSKV_BUILD_KERNELS=0 builds none, =1 makes it an error where they cannot be built
#   make clean   remove the environment and everything that was built
#
# PYTHON=python3.12 picks the interpreter, VENV=path another environment, PYTEST_ARGS="-k cache" some of the tests.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n auto --maxprocesses=4
PEERS ?=
KVPRESS ?= .venv-kvpress
VLLM ?= .venv-vllm
VLLM_PYTEST_ARGS ?=
RESULTS ?= docs/results
MODELS ?= smollm2 qwen2.5-coder-1.5b
SUITES ?= caches tokens generation factors widths blocks texts texts-other rebuild paper

BIN := $(VENV)/bin
STAMP := $(VENV)/.cskv-installed
BUILD := pyproject.toml setup.py $(wildcard src/cskv/attention/cpu/kernels/*)  # what an installation is made from

.PHONY: venv check test test-fallback test-kvpress test-lm-eval test-vllm demo bench results clean

venv: $(STAMP)

$(STAMP): $(BUILD) constraints.txt scripts/install_torch.sh
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "cskv needs Python 3.11 or newer; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	scripts/install_torch.sh $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all,dev]'
	touch $(STAMP)

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: venv
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Every layout and rule, and models of every family that decode: half a minute on two cores.
test-fallback: venv
	CSKV_CPU_KERNELS=off $(BIN)/python -m pytest $(PYTEST_ARGS) -k "not triton" \
		tests/attention --ignore=tests/attention/triton --ignore=tests/attention/cpu \
		tests/attachment/test_quantised_modes.py::test_a_whole_text_is_read_as_it_is_decoded \
		tests/attachment/test_generation_modes.py::test_full_rank_logits_agree_at_every_step

# Not part of `test`: the harness brings forty packages. In an environment that has it, `test` runs these as well.
test-lm-eval: venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[lm-eval]'
	$(BIN)/python -m pytest tests/harness $(PYTEST_ARGS)

demo: venv
	$(BIN)/python examples/demo.py

bench: venv
	$(if $(PEERS),$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[peers]' || echo "no peers: hqq needs a C++ compiler; its rows are left out")
	$(BIN)/python -m benchmarks.speed decode $(BENCH_ARGS)
	test ! -f models/smollm2/config.json || $(BIN)/python -m benchmarks.speed models --models smollm2
	$(BIN)/python -m benchmarks.speed levels
	$(BIN)/python -m benchmarks.speed generation
	$(BIN)/python -m benchmarks.speed report

# kvpress takes transformers below 5.3, so it gets an environment of its own; the library runs with both.
$(KVPRESS)/ready: $(BUILD) constraints-kvpress.txt scripts/install_torch.sh
	test -x $(KVPRESS)/bin/python || $(PYTHON) -m venv $(KVPRESS)
	scripts/install_torch.sh $(KVPRESS)/bin/python
	$(KVPRESS)/bin/python -m pip install --quiet -c constraints-kvpress.txt -e '.[data]' kvpress pytest hypothesis beartype
	touch $@

test-kvpress: $(KVPRESS)/ready
	$(KVPRESS)/bin/python -m pytest tests/methods tests/evaluation

# vLLM takes transformers below 5.20. In its environment nothing of ours may move what it is held at.
$(VLLM)/ready: $(BUILD) constraints.txt constraints-vllm.txt scripts/install_torch.sh scripts/install_vllm.sh
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	scripts/install_vllm.sh $(VLLM)/bin/python -e . pytest hypothesis beartype
	touch $@

test-vllm: $(VLLM)/ready
	$(VLLM)/bin/python -m pytest tests/vllm $(VLLM_PYTEST_ARGS)

# WikiText-2's validation text to calibrate on, and its test text to measure on.
WIKITEXT := models/wikitext-2/valid.txt models/wikitext-2/test.txt

models/wikitext-2/%.txt:
	curl -fsSL --create-dirs -o $@.part https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/$*.txt
	mv $@.part $@

models/%/config.json: | venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[gguf]'
	$(BIN)/python scripts/fetch_model.py $* models/$*

# `tokens` needs kvpress, whose environment cannot hold the other peers.
results: venv $(KVPRESS)/ready $(MODELS:%=models/%/config.json) $(WIKITEXT)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[peers]'
	set -e; for model in $(MODELS); do for suite in $(SUITES); do \
		python=$(BIN)/python; if test $$suite = tokens; then python=$(KVPRESS)/bin/python; fi; \
		$$python -m benchmarks.quality $$suite --model $$model --out $(RESULTS) \
			--calibration $(word 1,$(WIKITEXT)) --heldout $(word 2,$(WIKITEXT)); \
	done; done
	$(BIN)/python -m benchmarks.quality $(if $(filter docs/results,$(RESULTS)),report,check $(RESULTS))

clean:
	rm -rf $(VENV) $(KVPRESS) $(VLLM) build dist outputs src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis src/cskv/attention/cpu/_kernels*.so
	find src tests examples tinymodel benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
