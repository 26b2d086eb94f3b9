# `make` lists the targets. Variables can be set on the command line or in the environment:
#
#   PYTHON      the interpreter the virtual environment is made with (3.11 or newer)
#   EXTRAS      extras of pyproject.toml to install; for an NVIDIA GPU: EXTRAS=cuda,export,tensorrt-rtx,dev,bench
#   TORCH_ARGS  arguments for `pip install torch`. On Linux the usual index gives the CUDA build of torch, several GB.
#               For the CPU build, pass the index that the torch installation page names for it:
#               TORCH_ARGS='--index-url URL'
#   MINUTES     of `make train-demo`
#
# The first three matter when .venv is made, which remembers the last two: remove .venv to set it up with other values.

PYTHON ?= python3
-include .venv/.settings
EXTRAS ?= cpu,export,tensorrt-rtx,dev,bench
TORCH_ARGS ?=
MINUTES ?= 20
export EXTRAS TORCH_ARGS

VENV := .venv
RUN := $(VENV)/bin/python -m
INSTALLED := $(VENV)/.installed
# The version stands in pyproject.toml alone.
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)

.DEFAULT_GOAL := help
.PHONY: help demo train-demo test test-slow lint clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

demo: $(INSTALLED)  ## demo checkpoint -> engines in build/demo-bundle -> out/demo.mp4 (a small cascade of our own)
	$(RUN) export build --stage all --checkpoint demo --out build/demo-bundle
	mkdir -p out
	$(RUN) runtime.cli generate "a large red circle moving right over a white background" --bundle build/demo-bundle \
		--preset draft --steps base=40,interp=8,sr1=4,sr2=20 --size 576x320 --out out/demo.mp4

train-demo: $(INSTALLED)  ## train the demo checkpoint anew, MINUTES=20 on a data-centre GPU; run again to continue
	$(RUN) export train-demo --minutes $(MINUTES) --pack build/demo_checkpoint.tar.xz

test: $(INSTALLED)  ## ruff, mypy and all tests but the slow ones
	$(RUN) ruff check .
	$(RUN) mypy
	$(RUN) pytest

test-slow: $(INSTALLED)  ## the slow tests alone (minutes)
	$(RUN) pytest --run-slow -m slow

lint: $(INSTALLED)  ## ruff (rules and format) and mypy
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

clean:  ## remove build/, bundle/, out/ and caches; .venv stays
	rm -rf build bundle out .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find bench engines export runtime tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first: the second command then finds it in place and keeps the build chosen here.
$(INSTALLED): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit("show1-rt needs Python 3.11 or newer, $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install $(TORCH_ARGS) "$(TORCH)"
	$(RUN) pip install -e '.[$(EXTRAS)]'
	@printf 'EXTRAS ?= %s\nTORCH_ARGS ?= %s\n' "$$EXTRAS" "$$TORCH_ARGS" > $(VENV)/.settings
	@touch $@
