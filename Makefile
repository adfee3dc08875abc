# Two commands do the work, from a bare clone: `make train` and `make test`. ARGS="..." is passed on.
# `make test` leaves out what is marked slow; `make test-all` is what CI runs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Processes that share the tests, one thread each: a worker takes up to 2 GiB.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n > 8 ? 8 : n)))
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadscope

# What an installation depends on; Python files do not count, the installation is editable.
INPUTS := pyproject.toml CMakeLists.txt constraints.txt $(wildcard kernels/*.cpp kernels/*.h kernels/*/*.cpp kernels/*/*.h)

.DEFAULT_GOAL := help
.PHONY: help train test test-all bench gate lint format native-asan clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

train: $(VENV)/.installed  ## Fine-tune; without a GPU on the embedded world. ARGS="--steps 50"
	$(BIN)/sqdf-fast train $(ARGS)

test: $(VENV)/.installed-test  ## Run the fast tests. ARGS="tests/kernels -q"
	$(TESTS) -m "not slow" $(ARGS)

test-all: $(VENV)/.installed-test  ## Run every test
	$(TESTS) $(ARGS)

bench: $(VENV)/.installed-test  ## Time the fused ops, record the results, draw them
	mkdir -p build
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-columns=median,iqr,rounds --benchmark-json=build/bench.json
	$(BIN)/python bench record build/bench.json
	$(BIN)/python bench pages

gate: $(VENV)/.installed-test  ## Compile every Triton kernel for every GPU generation; no GPU needed. ARGS="--write"
	$(BIN)/python tests/kernels/gate.py $(ARGS)

lint: $(VENV)/.installed-dev build/package  ## Style, format, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd build/package && MYPYPATH=. $(abspath $(BIN))/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache
	cd build/package && PYTHONPATH=$$($(abspath $(BIN))/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
	  $(abspath $(BIN))/python -S -c 'from importlinter.cli import lint_imports_command; lint_imports_command()' \
	  --config ../../pyproject.toml --cache-dir ../../.import_linter_cache

format: $(VENV)/.installed-dev  ## Rewrite the files in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

native-asan: $(VENV)/.installed-dev  ## The kernel tests on a native library built with sanitizers
	$(BIN)/cmake -S . -B build/asan -DSQDF_FAST_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo
	$(BIN)/cmake --build build/asan
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so.6)" ASAN_OPTIONS=detect_leaks=0 \
	  SQDF_FAST_NATIVE_LIBRARY=build/asan/libsqdf_fast_native.so $(TESTS) tests/kernels -k native $(ARGS)

clean:  ## Remove the environment and everything built
	rm -rf $(VENV) build

# The package as it is once installed, with kernels/ inside, for tools that read folders and run no import hooks.
.PHONY: build/package
build/package:
	rm -rf $@ && mkdir -p $@/sqdf_fast/kernels
	ln -s $(filter-out %/__pycache__ %/kernels,$(wildcard $(CURDIR)/sqdf_fast/*)) $@/sqdf_fast/
	ln -s $(filter-out %/__pycache__,$(wildcard $(CURDIR)/sqdf_fast/kernels/* $(CURDIR)/kernels/*)) $@/sqdf_fast/kernels/

# Each stamp says which extra is installed; a larger installation makes the smaller stamps too.
$(VENV)/.installed: $(INPUTS)
	$(call install,.)
	touch $@

$(VENV)/.installed-test: $(INPUTS)
	$(call install,.[test])
	touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(INPUTS)
	$(call install,.[dev])
	touch $@ $(VENV)/.installed-test $(VENV)/.installed

define install
test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '$(1)'
endef
