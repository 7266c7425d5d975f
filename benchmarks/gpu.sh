#!/usr/bin/env bash
# Kernel tests and all kernel benchmarks on a machine with a GPU, within nine minutes, without network or installation.
#
#     benchmarks/gpu.sh [--quick] [FOLDER]        FOLDER: where results go; default $OUT, else gpu_results
#
# --quick: one test file, and of every benchmark the first case: does it work? Also on a CPU.
# Needs python3 with torch, triton, numpy, pytest, pytest-timeout, matplotlib, psutil, nvidia-ml-py, transformers, safetensors and
# xxhash; nvcc for csrc/; megatron-core for the training step and for sleep and wake, which are left out without it.
# WHEELS=DIR: wheels of peers and of what is missing (liger-kernel, cut-cross-entropy, megatron-core) to unpack for this run.
# BUDGET_S=540: seconds for all.  COMMIT=HASH: what to record without git.  COMPARE=FILE: fail on a regression against it.
# Writes gpu.jsonl, tests.log, bench.log, plots.tgz and machine.txt. Ends with status 1 if anything failed or was left out.
set -uo pipefail
cd "$(dirname "$0")/.."

quick=()
[[ ${1:-} != --quick ]] || { quick=(--quick); shift; }
out=${1:-${OUT:-gpu_results}}
budget_s=${BUDGET_S:-540}
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
status=0
: >"$out/tests.log"
: >"$out/bench.log"

# In the order of importance, each with its part of the budget. What one leaves goes to those after it; the last 20 s are for the end.
parts=(csrc:35 tests:100 logprob:80 attention:75 policy_loss:20 train_step:60 sleep:40 moe:30 elementwise:25 adamw:20 packing:20 repetition:15)
whole=540
declare -A until_s
sum=0
for part in "${parts[@]}"; do
    sum=$((sum + ${part#*:}))
    until_s[${part%:*}]=$((sum * budget_s / whole))
done

fail() {
    echo "$2" | tee -a "$1"
    status=1
}

# name, log, command: until the end of its part
step() {
    local name=$1 log=$2
    shift 2
    local limit_s=$((until_s[$name] - SECONDS))
    if ((limit_s < 1)); then
        fail "$log" "left out: $name, no time"
        return
    fi
    echo "== $name (at ${SECONDS}s, until ${until_s[$name]}s)" | tee -a "$log"
    timeout --kill-after=5 "$limit_s" "$@" >>"$log" 2>&1
    local ended=$?
    ((ended == 0)) || fail "$log" "failed: $name, status $ended$( ((ended != 124)) || echo ', out of time')"
}

# The two import names, without an installation. What is compiled once serves tests and benchmarks.
mkdir "$work/tandem"
ln -s "$PWD/engine" "$work/tandem/engine"
ln -s "$PWD/kernels" "$work/tandem/kernels"
export PYTHONPATH="$work:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR="$work/triton" TORCHINDUCTOR_CACHE_DIR="$work/inductor"
if [[ -n ${WHEELS:-} ]]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/peers" "$WHEELS"/*.whl && PYTHONPATH="$PYTHONPATH:$work/peers"
fi

{
    date -u +%FT%TZ
    nvidia-smi
    "$python" -c 'import sys, torch, triton; print(sys.version, torch.__version__, triton.__version__, torch.cuda.is_available() and torch.cuda.get_device_name())'
} >"$out/machine.txt" 2>&1
tail -n 1 "$out/machine.txt"

# Beside no pyproject.toml, which setuptools before version 77 refuses.
mkdir "$work/build"
ln -s "$PWD"/{setup.py,csrc,engine,kernels} "$work/build"
step csrc "$out/tests.log" env -C "$work/build" "$python" setup.py -q build_ext --inplace
if [[ -n $(command -v nvcc /usr/local/cuda/bin/nvcc) && ! -e kernels/_cuda.so ]]; then
    fail "$out/tests.log" "left out: CUDA C++, nvcc has not built it"
fi

# Several processes at once: most of the time they compile. Without conftest.py, whose fixtures need all that the engine does.
# What compiles for chips that are not there is tested without a GPU.
mapfile -t files < <(ls tests/kernels/test_*.py tests/checkpoint/test_device_buckets.py | grep -v test_compiled)
((${#quick[@]} == 0)) || files=(tests/kernels/test_backend.py tests/checkpoint/test_device_buckets.py)
jobs=$(nproc)
((jobs <= ${#files[@]})) || jobs=${#files[@]}
cat >"$work/tests.sh" <<'SCRIPT'
status=0
for ((i = 0; i < JOBS; i++)); do
    own=()
    for ((j = i + 2; j <= $#; j += JOBS)); do own+=("${!j}"); done
    "$1" -m pytest "${own[@]}" -rfEs --noconftest -p tests.kernels.interpreter -p no:cacheprovider --timeout 100 --durations=5 >"$WORK/tests$i.log" 2>&1 &
done
for job in $(jobs -p); do wait "$job" || status=1; done
exit "$status"
SCRIPT
WORK=$work JOBS=$jobs step tests "$out/tests.log" bash "$work/tests.sh" "$python" "${files[@]}"
cat "$work"/tests*.log >>"$out/tests.log" 2>/dev/null
grep -hE '^(FAILED|ERROR)|(passed|failed|error).* in ' "$out/tests.log"

options=(--out "$work/results" "${quick[@]}")
[[ -z ${COMMIT:-} ]] || options+=(--commit "$COMMIT")
kernel_options=(--seconds 0.4 --heavy-first)
[[ -z ${COMPARE:-} ]] || kernel_options+=(--compare "$COMPARE")
for part in "${parts[@]:2}"; do
    name=${part%:*}
    if [[ $name != train_step && $name != sleep ]]; then
        step "$name" "$out/bench.log" "$python" "benchmarks/$name.py" "${options[@]}" "${kernel_options[@]}"
    elif "$python" -c 'import megatron.core' 2>/dev/null; then
        step "$name" "$out/bench.log" "$python" "benchmarks/$name.py" "${options[@]}"
    else
        fail "$out/bench.log" "left out: $name, megatron-core is not installed"
    fi
done
cat "$work"/results/*.jsonl >"$out/gpu.jsonl" 2>/dev/null
(cd "$work/results" 2>/dev/null && tar czf "$out/plots.tgz" ./*.png)
grep -E '^\||^error|measured here' "$out/bench.log" | cut -c1-200
echo "done in ${SECONDS}s, status $status; results in $out"
exit "$status"
