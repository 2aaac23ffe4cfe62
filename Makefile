# make: the short names of everyday work. What they do stands in CMakePresets.json and scripts/.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
FUZZ_SECONDS ?= 60
# Processes for the Python tests, most of whose time is torch's capturing, on one core. A GPU is for one of them at a time.
PYTEST_JOBS ?= $(if $(wildcard /dev/nvidia0),0,2)
LAUNCHER := $(if $(shell command -v ccache),-DCMAKE_CXX_COMPILER_LAUNCHER=ccache)
PYTHON := build/venv/bin/python
export CMAKE_BUILD_PARALLEL_LEVEL = $(JOBS)
# So that a checkout finds what another one compiled.
export CCACHE_BASEDIR = $(CURDIR)
export CCACHE_NOHASHDIR = 1

.PHONY: help setup build demo test sanitize asan tsan fuzz bench format clean
help:
	@echo 'make build     the program build/comfytp, with its library for GPUs where nvcc is'
	@echo 'make demo      split a full-size model over two devices and compare with one'
	@echo 'make test      build and run every test'
	@echo 'make sanitize  the tests under address, undefined and thread sanitizers, and fuzzing'
	@echo 'make bench     time against PyTorch on the same cores'
	@echo 'make setup     install what all of them need; they do it themselves'
	@echo 'make format    clang-format;  make clean: remove build/ but build/venv and build/demo'

setup: build/.setup-dev build/.setup-sanitize

build/.setup-%: scripts/setup requirements-build.txt requirements-dev.txt requirements-cuda12.txt requirements-cuda13.txt
	scripts/setup $*
	@touch $@

build: build/.setup-build
	cmake --preset release $(LAUNCHER)
	cmake --build --preset release
	ln -sfn release/comfytp build/comfytp

# The demo's devices are of the CPU: the library for GPUs, which takes minutes to compile, is left to `make build`.
demo: build/.setup-build
	cmake --preset release $(LAUNCHER)
	cmake --build --preset release --target comfytp_cli
	ln -sfn release/comfytp build/comfytp
	scripts/demo

build-tests: build/.setup-dev
	cmake --preset test $(LAUNCHER)
	cmake --build --preset test
	ln -sfn test/python build/python
.PHONY: build-tests

test: build-tests
	ctest --preset test -j $(JOBS)
	COMFYTP=$(CURDIR)/build/test/comfytp PYTHONPATH=$(CURDIR)/build/python GOMP_SPINCOUNT=1000 \
	  $(PYTHON) -m pytest -q -n $(PYTEST_JOBS) --dist worksteal tests

sanitize: asan tsan fuzz

asan tsan: build/.setup-sanitize
	cmake --preset $@ $(LAUNCHER)
	cmake --build --preset $@
	ctest --preset $@ -j $(JOBS)

fuzz: build/.setup-sanitize
	cmake --preset fuzz $(LAUNCHER)
	cmake --build --preset fuzz
	scripts/fuzz $(FUZZ_SECONDS)

bench: build-tests
	PYTHONPATH=$(CURDIR)/build/python $(PYTHON) bench/cpu_unet.py

format:
	clang-format -i $$(git ls-files '*.cpp' '*.h')

clean:
	rm -rf build/comfytp build/python build/release build/debug build/test build/asan build/tsan build/fuzz
