#!/usr/bin/env bash
# SGLang as an archive of 45 MB, for a machine with a GPU and without a network: what benchmarks/gpu_loop.sh takes as SGLANG_SITE.
#
#     benchmarks/sglang_site.sh FOLDER                                                 here; writes FOLDER/sglang-cp312.tar.xz
#     mkdir SITE; tar -xJf sglang-cp312.tar.xz -C SITE; SGLANG_SITE=SITE benchmarks/gpu_loop.sh      there
#
# SGLang 0.5.17 for Python 3.12, torch 2.11 and CUDA 13, with what a server of Qwen3 needs that is started with
# `--attention-backend triton --sampling-backend pytorch`. Left out: FlashAttention 3, kernels for Blackwell, image and video generation,
# SGLang's programs in Rust. What it lacks shows there as an ImportError: add it to `packages`.
# PYTHON=python3: an interpreter with pip, of any version.
set -euo pipefail

folder=${1:?"the folder to write the archive to"}
python=${PYTHON:-python3}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

packages=(
    sglang==0.5.17 sglang-kernel==0.4.5 flashinfer_python==0.6.15.post1 torch_memory_saver==0.0.10 xgrammar==0.2.1
    transformers==5.12.1 tokenizers==0.22.2 apache-tvm-ffi==0.1.11 openai==2.6.1 openai-harmony==0.0.4 pydantic==2.13.0 pydantic_core==2.46.0
    compressed-tensors fastapi starlette uvicorn watchfiles httpx httpcore sniffio anthropic distro jiter annotated_types interegular
    llguidance loguru msgspec orjson partial_json_parser pybase64 python_multipart pyzmq setproctitle cloudpickle gguf tabulate zstandard
    dill opentelemetry-api jsonschema jsonschema-specifications referencing rpds-py soundfile cffi typing-inspection
)
platforms=()
for name in manylinux_2_34 manylinux_2_31 manylinux_2_28 manylinux_2_27 manylinux_2_26 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux_2_5 manylinux1; do
    platforms+=(--platform "${name}_x86_64")
done
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
    "${platforms[@]}" --dest "$work/wheels" "${packages[@]}"

mkdir "$work/site"
for wheel in "$work"/wheels/*.whl; do
    "$python" -m zipfile -e "$wheel" "$work/site"
done
cd "$work/site"
# Two names of IPython are imported, and IPython needs twelve packages.
mkdir IPython
echo 'def get_ipython(): return None' >IPython/__init__.py
printf 'def display(*_, **__): return None\nHTML = Image = Markdown = clear_output = display\n' >IPython/display.py
rm -rf sglang/multimodal_gen sglang/test triton_kernels ./*.data bin
rm -rf sgl_kernel/{sm100,sm120} sgl_kernel/flash_ops*.so sgl_kernel/spatial* torch_memory_saver_*cu12*
rm -rf flashinfer/data/cutlass/{docs,media,test,examples,python}
find . -name __pycache__ -prune -exec rm -rf {} +
find . -name '*.a' -delete
find sglang -name '*.so' -size +1M -delete
find . -type f -name '*.so*' -exec strip --strip-unneeded {} + 2>/dev/null || true
tar -c . | xz -9 -T2 >"$folder/sglang-cp312.tar.xz"
du -h "$folder/sglang-cp312.tar.xz"
