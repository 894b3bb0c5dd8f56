# make demo | test | lint | model | plan-all. The first call makes .venv (Python >= 3.11) and installs into it; later
# ones reuse it until pyproject.toml changes. `make demo PYTHON=/path/to/python3.12` chooses the interpreter.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Huge pages make XLA on CPU faster where the C library is glibc; elsewhere the variable is ignored.
CPU_ENV := JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1 GLIBC_TUNABLES=glibc.malloc.hugetlb=1

.PHONY: demo test lint model plan-all clean help

help:
	@echo "make demo   self-play with the embedded model on CPU, ends with a report (set-up included)"
	@echo "make test   the test suite"
	@echo "make lint   ruff and mypy"
	@echo "make model  rebuild the embedded model from nothing (CPU, up to 90 minutes)"
	@echo "make plan-all  compile every config for its slice, write docs/hardware.md (20 to 60 minutes; can be stopped and continued)"
	@echo "make clean  remove $(VENV) and caches; runs/ stays"

demo: $(VENV)/.installed
	$(CPU_ENV) $(BIN)/azr-jax train configs/demo.yaml

test: $(VENV)/.installed-test
	JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy azr_jax

model: $(VENV)/.installed
	$(CPU_ENV) $(BIN)/azr-jax pretrain --out azr_jax/models/embedded --overwrite

plan-all: $(VENV)/.installed-test
	JAX_PLATFORMS=cpu $(BIN)/python benchmarks/plan_all.py

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info

$(VENV)/.installed: pyproject.toml $(BIN)/python
	@echo "installing azr_jax into $(VENV) (about a minute)"
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml $(BIN)/python
	@echo "installing azr_jax and its test tools into $(VENV) (about a minute)"
	$(PIP) --editable ".[test]"
	@touch $@ $(VENV)/.installed

# The first interpreter that is new enough and can make a virtual environment.
$(BIN)/python:
	@old=; bare=; chosen=; \
	for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do \
	  "$$python" -c "" 2>/dev/null || continue; \
	  if ! "$$python" -c "import sys; sys.exit(sys.version_info < (3, 11))"; then old="$$python"; continue; fi; \
	  if ! "$$python" -c "import ensurepip, venv" 2>/dev/null; then bare="$$python"; continue; fi; \
	  chosen="$$python"; break; \
	done; \
	if [ -z "$$chosen" ]; then \
	  if [ -n "$$bare" ]; then \
	    echo "error: $$bare cannot make virtual environments; install its venv package (Debian: apt install python3-venv)" >&2; \
	  elif [ -n "$$old" ]; then \
	    echo "error: $$old is $$("$$old" --version 2>&1), azr_jax needs Python 3.11 or newer; give one with make PYTHON=..." >&2; \
	  else \
	    echo "error: no Python found; install Python 3.11 or newer, or give one with make PYTHON=..." >&2; \
	  fi; \
	  exit 1; \
	fi; \
	echo "making $(VENV) with $$("$$chosen" --version 2>&1)"; \
	"$$chosen" -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }
