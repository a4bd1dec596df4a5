#!/usr/bin/env bash
# install_packages.sh CONSTRAINTS: installs the releases of CONSTRAINTS (constraints/gpu.txt) into the
# environment whose pip comes first. The image's build runs it; it also runs without Docker, in a fresh
# environment of Python 3.12 (docs/installation.md).
#   BASE=cuda|ngc         ngc leaves out what NVIDIA's image brings; default cuda
#   APEX_REF=             a commit of NVIDIA's Apex to build; default none
#   COMPILE=yes|no        no: all but Transformer Engine's torch extension; default yes
set -euo pipefail

constraints=$1
BASE=${BASE:-cuda} APEX_REF=${APEX_REF:-} COMPILE=${COMPILE:-yes}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

case $BASE in
    # The torch extension is source. It is compiled below, when torch is there.
    cuda) left_out='^transformer-engine-torch==' ;;
    # NVIDIA's own builds of these go together, and vLLM's release is for another torch.
    ngc) left_out='^(torch|torch[a-z]+|triton|nvidia-.*|cuda-.*|nccl.*|transformer-engine.*|vllm|flashinfer-python|numpy|setuptools)==' ;;
    *) echo "error: BASE is '$BASE'; it has to be cuda or ngc" >&2; exit 2 ;;
esac
grep -vE "$left_out" "$constraints" > "$work/releases.txt"
# Everything is listed, so nothing has to be resolved again.
pip install --no-cache-dir --no-deps --requirement "$work/releases.txt"

if [ "$BASE" = cuda ] && [ "$COMPILE" = yes ]; then
    grep -E '^transformer-engine-torch==' "$constraints" > "$work/extension.txt"
    pip install --no-cache-dir "pybind11>=3,<4" "wheel>=0.45,<1"
    packages=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # cuDNN and NCCL in the releases that torch loads, not those of the base image. Without FORCE_BUILD
    # its setup first looks on GitHub for a wheel, which nothing here has a checksum of.
    CPATH=$packages/nvidia/cudnn/include:$packages/nvidia/nccl/include${CPATH:+:$CPATH} \
        NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE \
        pip install --no-cache-dir --no-deps --no-build-isolation --requirement "$work/extension.txt"
fi

if [ -n "$APEX_REF" ]; then
    APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-cache-dir --no-build-isolation \
        "apex @ git+https://github.com/NVIDIA/apex@$APEX_REF"
fi
