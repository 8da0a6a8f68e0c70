#!/usr/bin/env bash
# Everything that needs a GPU: build, tests, compute-sanitizer, benchmarks, results.
#
#   bash bench/gpu.sh            # every stage that is not done yet; each ends within 8 minutes
#   bash bench/gpu.sh --list     # the stages, and which are done
#   bash bench/gpu.sh --minutes 20   # starts no stage after 20 minutes; run it again to go on
#
# Needs Linux, nvcc, PyTorch 2.11 or newer, Triton 3.6 or newer, pybind11, cmake and ninja, and no
# network. pytest and hypothesis run the tests where they are there. PYTHON chooses the interpreter.
# Results: bench/results/<gpu>.json and <gpu>.md.
cd "$(dirname "$0")/.." || exit 1
exec "${PYTHON:-python3}" -m bench.gpu "$@"
