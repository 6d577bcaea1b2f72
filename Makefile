# make demo       serve a small MLA model through vLLM with our attention and compare with transformers
# make test       lint and every test that needs no GPU
# make test-gpu   kernel tests on the GPU that is here, and the engine's tests that need one
# make lint       ruff alone
# make compile-matrix  compile the Hopper kernel with Triton 3.6 to 3.9, without a GPU; 3 GB in build/
# make venv       only the set-up: a virtual environment in .venv, with Python 3.11
# make clean      remove everything that the others made, .venv too
#
# ENV=current     use the packages of the current python3 and install nothing
# PYTHON=PATH     the Python 3.11 to make .venv with (read when .venv is first made)
# TORCH_INDEX=URL one more package index, for PyTorch's CPU wheels: the CPU index that PyTorch's install page names.
#                 Needed where pip finds no torch "+cpu" by itself, on machines without an NVIDIA GPU.

VENV := .venv
STAMP := $(VENV)/.installed
IS_311 := import sys; sys.exit(sys.version_info[:2] != (3, 11))
BASE = $(or $(PYTHON),$(shell for p in python3.11 python3; do $$p -c '$(IS_311)' 2>/dev/null && break; done; echo $$p))

# ENV is also a name that some shells export; any other value means nothing here.
ifeq ($(ENV),current)
RUN := python3
READY := installed
else
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python
READY := $(STAMP)
endif

WORKERS := 2
TRITONS := 3.6.0 3.7.1 3.8.0 3.9.0

.PHONY: help venv installed demo test test-gpu lint compile-matrix clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

venv: $(STAMP)

$(STAMP): pyproject.toml $(wildcard stubs/*/pyproject.toml)
	@for python in "$(BASE)" $(wildcard $(VENV)/bin/python); do \
	  "$$python" -c '$(IS_311)' 2>/dev/null && continue; \
	  version=$$("$$python" -c 'import platform; print(platform.python_version())' 2>/dev/null || echo missing); \
	  echo "Python 3.11 is needed and $$python is $$version: install it, name it with PYTHON=/path/to/python3.11," \
	    "or remove an old $(VENV)." >&2; exit 1; \
	done
	@test -x $(VENV)/bin/pip || { echo "Making $(VENV) with $(BASE) ..."; "$(BASE)" -m venv $(VENV); }
	@if nvidia-smi -L >/dev/null 2>&1; then \
	  echo "Installing vLLM for CUDA (there is an NVIDIA GPU) and this package: about 10 GB, several minutes ..."; \
	  set -- -e '.[vllm,test]'; \
	else \
	  echo "Installing vLLM's CPU build (there is no NVIDIA GPU) and this package: about 3 GB, 2 to 5 minutes ..."; \
	  set -- ./stubs/*/ -e '.[cpu,test]'; \
	fi; \
	$(VENV)/bin/python -m pip install --disable-pip-version-check \
	  $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") "$$@" || { \
	  echo "Installation failed. If pip found no torch ...+cpu, add TORCH_INDEX=URL (see the top of the Makefile)." >&2; \
	  exit 1; }
	@touch $@

# -P: an egg-info left in this folder by another Python must not count.
installed:
	@$(RUN) -P -c 'import sys; from importlib.metadata import entry_points as e; \
	  sys.exit("mla_backend" not in {p.name for p in e(group="vllm.general_plugins")})' || { \
	  echo "vLLM finds plugins only if they are installed, and for $$(command -v $(RUN)) mla-backend is not. Run:" \
	    "$(RUN) -m pip install --no-deps -e ." >&2; exit 1; }

demo: $(READY)
	@$(RUN) examples/demo.py

# Kernels run in Triton's interpreter; the engine's tests choose for themselves. The server's tests watch the clock, so
# nothing else runs beside them.
test: lint
	TRITON_INTERPRET=1 $(RUN) -m pytest -q -n $(WORKERS) kernels/tests
	$(RUN) -m pytest -q -n $(WORKERS) --dist loadfile integration_tests --ignore integration_tests/test_vllm_serve.py
	$(RUN) -m pytest -q integration_tests/test_vllm_serve.py

# Kernel tests take the GPU that is there; of the engine's, only those made for one.
test-gpu: $(READY)
	$(RUN) -m pytest -q kernels/tests
	$(RUN) -m pytest -q -m gpu integration_tests

lint: $(READY)
	@if [ "$(ENV)" = current ] && ! $(RUN) -m ruff --version >/dev/null 2>&1; then \
	  echo "ruff is not installed for $(RUN): lint left out"; \
	else $(RUN) -m ruff check . && $(RUN) -m ruff format --check .; fi

compile-matrix: $(TRITONS:%=build/triton-%/.installed)
	$(RUN) kernels/tests/compile_matrix.py $(^D)

build/triton-%/.installed: | $(READY)
	$(RUN) -m pip install --disable-pip-version-check --quiet --no-deps --upgrade --target $(@D) triton==$*
	@touch $@

clean:
	rm -rf $(VENV) models build dist *.egg-info stubs/*/build stubs/*/*.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
