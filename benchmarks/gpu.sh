#!/usr/bin/env bash
# Measures training and sampling on one CUDA device, unattended and without a network, within a time budget.
#
#   benchmarks/gpu.sh --wheels               once, where there is a network: wheels/ gets what such a machine lacks
#   benchmarks/gpu.sh --minutes 9            measures into outputs/gpu.json; started again, it does what is missing
#   benchmarks/gpu.sh --quick                tries all of it in small on any machine, a CPU too
#
# PYTHON names the interpreter, python3 by default; it needs torch, transformers, accelerate and safetensors.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels=benchmarks/gpu/wheels

if [ "${1:-}" = --wheels ]; then
    "$python" -m pip download --quiet --python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 \
        --platform manylinux2014_x86_64 --only-binary=:all: --no-deps --dest "$wheels" diffusers==0.42.1 torchao==0.18.0 importlib_metadata zipp
    du -sh "$wheels"
    exit
fi

site=${GPU_SITE:-outputs/gpu-site}
if compgen -G "$wheels/*.whl" > /dev/null && [ ! -e "$site/diffusers" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" "$wheels"/*.whl
fi
mkdir -p outputs
export PYTHONPATH="src:benchmarks:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
exec "$python" -m gpu "$@"
