# One command for each thing a person does with the repository; .ci/run calls the same ones.
#
#   make demo    install, then calibrate, train and generate on the bundled model; prints one table
#   make test    install, then run the tests
#   make check   install, then lint, format, types and import layers
#   make bench   install, then measure decoding speed (a quarter of an hour on two cores, on a quiet machine), and fill
#                docs/decode-speed.md; what is measured already is kept. PEERS=1 installs hqq and quanto to compare with
#   make venv    install only
#   make clean   remove the environment and everything that was built
#
# PYTHON=python3.12 picks the interpreter, VENV=path another environment, PYTEST_ARGS="-k cache" some of the tests.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n auto --maxprocesses=4
PEERS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.cskv-installed

.PHONY: venv check test demo bench clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/install_torch.sh
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

demo: venv
	$(BIN)/python examples/demo.py

bench: venv
	$(if $(PEERS),$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[peers]' || echo "no peers: hqq needs a C++ compiler; its rows are left out")
	$(BIN)/python benchmarks/decode.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/decode_report.py

clean:
	rm -rf $(VENV) build dist outputs src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests examples tinymodel -name __pycache__ -type d -prune -exec rm -rf {} +
