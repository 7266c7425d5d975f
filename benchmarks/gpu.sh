#!/usr/bin/env bash
# Kernel tests and all kernel benchmarks on a machine with a GPU, within nine minutes, without network or installation.
#
#     benchmarks/gpu.sh [FOLDER]          FOLDER: where results go; default $OUT, else gpu_results
#
# Needs python3 with torch, triton, numpy, pytest, pytest-timeout, matplotlib, psutil and nvidia-ml-py; nvcc for csrc/.
# WHEELS=DIR: wheels of peers (liger-kernel, cut-cross-entropy) to unpack for this run.  COMMIT=HASH: what to record without git.
# BUDGET_S=540: when nothing more is started.  COMPARE=FILE: fail on a regression against it.
# Writes gpu.jsonl, tests.log, bench.log, plots.tgz and machine.txt. Ends with status 1 if anything failed or was left out.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${1:-${OUT:-gpu_results}}
budget_s=${BUDGET_S:-540}
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
status=0

remaining() { echo $((budget_s - SECONDS)); }
# name, log, most seconds, command
step() {
    local name=$1 log=$2 limit_s=$3
    shift 3
    local left_s
    left_s=$(remaining)
    if ((left_s < 15)); then
        echo "left out: $name, no time" | tee -a "$log"
        status=1
        return
    fi
    echo "== $name (at ${SECONDS}s)" | tee -a "$log"
    timeout --kill-after=5 "$((limit_s < left_s ? limit_s : left_s))" "$@" >>"$log" 2>&1
    local ended=$?
    ((ended == 0)) || { echo "failed: $name, status $ended" | tee -a "$log"; status=1; }
}

# The two import names, without an installation.
mkdir "$work/tandem"
ln -s "$PWD/engine" "$work/tandem/engine"
ln -s "$PWD/kernels" "$work/tandem/kernels"
export PYTHONPATH="$work:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [[ -n ${WHEELS:-} ]]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/peers" "$WHEELS"/*.whl && PYTHONPATH="$PYTHONPATH:$work/peers"
fi

{
    date -u +%FT%TZ
    nvidia-smi
    "$python" -c 'import sys, torch, triton; print(sys.version, torch.__version__, triton.__version__, torch.cuda.get_device_name())'
} >"$out/machine.txt" 2>&1
tail -n 1 "$out/machine.txt"

step "csrc" "$out/tests.log" 120 "$python" setup.py -q build_ext --inplace
step "kernel tests" "$out/tests.log" 200 "$python" -m pytest tests/kernels -q -p no:cacheprovider --timeout 100 --durations=10
tail -n 3 "$out/tests.log"

rm -f "$out/gpu.jsonl"
for script in $(grep -l '^SUBJECT = ' benchmarks/*.py); do
    name=$(basename "$script" .py)
    options=(--out "$work/results" --seconds 0.4)
    [[ -z ${COMMIT:-} ]] || options+=(--commit "$COMMIT")
    [[ -z ${COMPARE:-} ]] || options+=(--compare "$COMPARE")
    step "benchmark $name" "$out/bench.log" 150 "$python" "$script" "${options[@]}"
done
cat "$work"/results/*.jsonl >"$out/gpu.jsonl" 2>/dev/null
(cd "$work/results" 2>/dev/null && tar czf "$out/plots.tgz" ./*.png)
grep -E '^\||^error|measured here' "$out/bench.log" | cut -c1-200
echo "done in ${SECONDS}s, status $status; results in $out"
exit "$status"
