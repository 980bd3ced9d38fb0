# make demo     build, install, fetch the default model, show it work
# make test     lint, types and the whole suite, in the same .venv
# make lint     ruff and mypy only
# make test-sanitize   the native tests under ASan with UBSan, and under TSan (a build each)
# make bench    the engine alone; its peers too with BENCH_ARGS="--peer-python ..."
# make docs     the pages that are made from the code
# make wheel    build a wheel and try it in an empty venv
# make clean    remove what was built; models stay

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CODE := src tests benchmarks examples
NATIVE := pyproject.toml CMakeLists.txt $(wildcard csrc/*)
# A folder's time changes when a file in it comes or goes, which is when an installation must learn of it.
FOLDERS := $(shell find src -type d -not -name __pycache__)

# Tests start some hundred Python processes: let the first one leave its compiled modules to the others.
unexport PYTHONDONTWRITEBYTECODE

# Before a quiet command: a dot every two seconds, so that nobody has to guess whether it hangs.
TICKS := while sleep 2 && kill -0 $$$$ 2>/dev/null; do printf .; done &

.PHONY: demo test test-sanitize lint bench docs wheel clean

demo: $(VENV)/.demo
	$(BIN)/hob pull smollm2-135m
	$(BIN)/hob demo

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

test-sanitize: $(VENV)/.test
	$(BIN)/python -m tests.sanitize

bench: $(VENV)/.test
	$(BIN)/python benchmarks/engine.py $(or $(BENCH_ARGS),--no-peers)

docs: $(VENV)/.test
	$(BIN)/hob config --markdown > docs/settings.md

wheel: $(VENV)/.tools
	rm -rf build/try dist/*.whl
	$(PIP) wheel . --no-deps --no-build-isolation --wheel-dir dist
	$(PYTHON) -m venv build/try
	build/try/bin/python -m pip --disable-pip-version-check install --quiet dist/*.whl
	cd build/try && bin/hob --version && bin/python -c "import hob.native; print('native:', hob.native.available_isas())"

# The build's own tools are installed, not isolated: a second build then compiles only what changed.
$(VENV)/.tools:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Hob needs Python 3.11 or newer, this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@command -v $(or $(CXX),c++) >/dev/null || { echo "Hob needs a C++20 compiler, e.g. apt install g++"; exit 1; }
	@echo "making $(VENV), with the tools of the build"
	@$(TICKS) test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(TICKS) $(PIP) install --quiet 'scikit-build-core>=0.11' 'nanobind>=2.9' 'cmake>=3.22' ninja
	@echo; touch $@

$(VENV)/.demo: $(VENV)/.tools $(NATIVE) $(FOLDERS)
	@echo "building the compute core and installing Hob: a minute or two"
	@$(TICKS) $(PIP) install --quiet --no-build-isolation '.[demo]'
	@echo; touch $@

$(VENV)/.test: $(VENV)/.tools $(NATIVE) $(FOLDERS)
	@echo "building the compute core and installing Hob with what its tests need: some minutes the first time"
	@$(TICKS) $(PIP) install --quiet --no-build-isolation --editable '.[test]'
	@echo; touch $@

clean:
	rm -rf build dist $(VENV)
