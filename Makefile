# `make demo` and `make test` each do all of their own set-up in .venv; a second call installs nothing again.

PYTHON ?= python3
# The default torch wheel brings gigabytes of CUDA libraries; machines without an NVIDIA GPU get the CPU build from here.
CPU_INDEX ?= https://download.pytorch.org/whl/cpu

# Threads that spin while they wait starve each other on a busy machine.
export OMP_WAIT_POLICY ?= PASSIVE

PIP = .venv/bin/python -m pip --disable-pip-version-check --no-input
succeeds = $(shell $(1) >/dev/null 2>&1 && echo yes)
need = $(if $(call succeeds,$(1)),,$(error $(2)))

.PHONY: demo test lint guard bench clips clean

demo: .venv/.installed
	.venv/bin/mowe demo

test: .venv/.installed-test
	.venv/bin/python -m pytest

lint: .venv/.installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# The floors of the speed-ups: ratios to baselines of the same run.
guard: .venv/.installed-test
	.venv/bin/python -m pytest benchmarks/test_mixture.py --benchmark-only -q

bench: .venv/.installed-test
	.venv/bin/python -m pytest benchmarks --benchmark-only

clips:
	$(PYTHON) scripts/make_clips.py

clean:
	rm -rf .venv build dist *.egg-info .benchmarks .mypy_cache .pytest_cache .ruff_cache

# The package is built with this setuptools and this torch, which its compiled library needs.
# No retries and a short timeout: where the index cannot be reached, pip goes on with the ones it can reach.
.venv/.torch: constraints.txt
	$(call need,$(PYTHON) -c 'import sys; assert sys.hexversion >= 0x30b0000',Python 3.11 or newer is needed; $(PYTHON) is $(or $(shell $(PYTHON) --version 2>/dev/null),missing) (name another with PYTHON=))
	$(call need,$(PYTHON) -c 'import venv; import ensurepip',$(PYTHON) cannot make virtual environments; install its venv module (Debian, Ubuntu: apt install python3-venv))
	$(PYTHON) -m venv .venv
	$(PIP) install --no-deps -c constraints.txt $(if $(call succeeds,nvidia-smi -L),,--extra-index-url $(CPU_INDEX) --retries 0 --timeout 5) 'setuptools>=77' torch
	touch $@

.venv/.installed: .venv/.torch pyproject.toml $(wildcard setup.py csrc/*)
	$(PIP) install -c constraints.txt --no-build-isolation -e .
	touch $@

.venv/.installed-test: .venv/.torch pyproject.toml $(wildcard setup.py csrc/*)
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[test]'
	touch $@
