# make demo    install into .venv and run the whole job on the committed Fashion-MNIST model
# make lint    install into .venv; ruff and mypy
# make test    install into .venv and run the suite (no GPU, no network beyond the package index)
# make test-slow    what takes longer: real size, further exports and builds, whole grids and sweeps
# make fuzz MINUTES=10    what is read, with many changes of real files, and under the fuzzer atheris where it installs
# make test-py310   the runtime's tests on Python 3.10
# make gpu-test    on a device: a small engine built and verified, then all tests that need a GPU; see build/gpu-report
# make gpu-report  packs what gpu-test found, for an issue
# make bench   the real-size figures of DiT-XL/2
PYTHON ?= python3
PYTHON310 ?= python3.10
VENV := .venv
BIN := $(VENV)/bin
# A test module runs on one worker, with the fixtures of its own; tests/conftest.py puts the longest first.
WORKERS ?= $(shell nproc)
# Without the worker that a crash took, a run would wait for ever: it ends and names the test.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder --max-worker-restart 0
DEMO := build/demo
# Python bindings without their libraries, FOLDER=REQUIREMENT: the contract tests look into each generation.
BINDINGS := \
  tensorrt-10.3=tensorrt-cu12-bindings==10.3.0 \
  tensorrt-10.16=tensorrt-cu12-bindings==10.16.1.11 \
  tensorrt-11.4=tensorrt-cu13-bindings==11.4.0.106 \
  cuda-bindings-12.8=cuda-bindings==12.8.0 \
  cuda-bindings-12.9=cuda-bindings==12.9.10 \
  cuda-bindings-13.5=cuda-bindings==13.5.0 \
  cuda-pathfinder=cuda-pathfinder==1.9.0

# Triton Inference Server on the CPU, from a wheel that needs numpy 1.26: an environment of its own, of 250 MB, which its
# tests ask for. Where the wheel is not to be had, they are skipped.
TRITON := build/triton
TRITON_PACKAGES := nvidia-pytriton==0.7.0 'tritonclient[all]==2.73.0' numpy==1.26.4 pillow

.PHONY: demo test test-slow fuzz test-py310 gpu-test gpu-report lint bench install clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "dit-export: exporting needs Python 3.11 to 3.13, $(PYTHON) is $$($(PYTHON) -V); set PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[export,cpu,openvino,rtx,report,serve,dev]'
	@for wheel in $(BINDINGS); do \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	    --target build/bindings/$${wheel%%=*} $${wheel#*=} || \
	    echo "no $${wheel#*=} for this Python: its contract test will be skipped" >&2; \
	done
	touch $@

demo: install
	$(BIN)/python benchmarks/fashion_mnist/demo.py --output $(DEMO)

test: install
	$(PYTEST)

# The export at real size alone, since it keeps a time and a peak of memory; then the rest on all workers.
REAL_SIZE := tests/benchmarks/test_real_size.py
test-slow: install $(TRITON)/installed
	$(BIN)/python -m pytest -m slow $(REAL_SIZE)
	$(PYTEST) -m slow --ignore $(REAL_SIZE)

$(TRITON)/installed: constraints.txt
	$(PYTHON) -m venv $(TRITON)
	@$(TRITON)/bin/python -m pip install --quiet --disable-pip-version-check $(TRITON_PACKAGES) \
	  $$(grep '^onnxruntime==' constraints.txt) && \
	  echo $(CURDIR)/runtime > $$(echo $(TRITON)/lib/python3.*/site-packages)/dit.pth && touch $@ || \
	  echo "no nvidia-pytriton for this Python or machine: the tests of Triton will be skipped" >&2

MINUTES ?= 10
fuzz: install
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'atheris>=3.0' || \
	  echo "no atheris for this Python: the property tests alone" >&2
	$(BIN)/python tests/fuzz/run.py $(MINUTES)

# The runtime on JetPack 6's Python 3.10 with numpy 1.26, without torch: its tests, on bundles that are exported here.
test-py310: install
	$(BIN)/python tests/support/exports.py build/py310
	$(PYTHON310) -m venv .venv-py310
	.venv-py310/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-py310.txt -e '.[cpu,openvino]' \
	  filelock hypothesis onnx pytest
	DIT_TEST_BUNDLES=build/py310 .venv-py310/bin/python -m pytest tests/runtime

# On a device, in an environment that sees its TensorRT (docs/backends.md): $(PYTHON) runs the tests, and nothing is
# installed. Without torch, DIT_BUNDLE=my.bundle takes the place of models exported here.
SECONDS ?= 600
gpu-test:
	$(PYTHON) tests/support/first_run.py --seconds $(SECONDS)

gpu-report:
	$(PYTHON) tests/support/first_run.py --pack

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python benchmarks/real_size.py

clean:
	rm -rf $(VENV) .venv-py310 build dist
