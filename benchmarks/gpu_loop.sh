#!/usr/bin/env bash
# The loop itself with SGLang: trainer and server take turns on one GPU. Writes its table of phases: seconds, and memory by NVML.
#
#     benchmarks/gpu_loop.sh [--cpu] [FOLDER]        FOLDER: where results go; default $OUT, else gpu_loop_results
#
# A random model of 0.5B parameters, 5 iterations, no warm start. --cpu: a tiny one, 2 iterations, to try the script; the trainer sleeps too.
# Needs python3 with what the trainer needs. No network, no installation.
# WHEELS=DIR: wheels of what is missing (megatron-core, tyro, docstring-parser, plotly) to unpack for this run.
# SGLANG_PYTHON=FILE: interpreter of SGLang's environment; default .sglang/bin/python.
# SGLANG_SITE=DIR: in place of that, a folder of packages that holds SGLang and what it needs, for the interpreter PYTHON: what an
# archive of benchmarks/sglang_site.sh was unpacked to. Its packages come before the interpreter's own.
# ATTENTION=triton SAMPLING=pytorch: backends of SGLang on the GPU.  STEPS.  TIMEOUT_S=540: seconds for all, START_TIMEOUT_S=240: for the
# server to start.
# SLEEP_BUDGET_BYTES: above it the run ends; 8 GiB, so that a table tells of what a run with the default of 2 GiB would only refuse.
# Writes loop.md, loop.jsonl, loop.log, run.tgz (configuration, metrics, logs, trace) and machine.txt. Ends with status 1 if the loop did.
set -uo pipefail
cd "$(dirname "$0")/.."

on_cpu=0
[[ ${1:-} != --cpu ]] || { on_cpu=1; shift; }
out=${1:-${OUT:-gpu_loop_results}}
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir "$work/tandem"
ln -s "$PWD/engine" "$work/tandem/engine"
ln -s "$PWD/kernels" "$work/tandem/kernels"
export PYTHONPATH="$work:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TRITON_CACHE_DIR="$work/triton"

if [[ -n ${WHEELS:-} ]]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/packages" "$WHEELS"/*.whl && PYTHONPATH="$PYTHONPATH:$work/packages"
fi

sglang_python=${SGLANG_PYTHON:-}
if [[ -n ${SGLANG_SITE:-} ]]; then
    # The server gets a PYTHONPATH of its own, so its interpreter brings the folder along.
    site=$(cd "$SGLANG_SITE" && pwd) || exit 2
    sglang_python="$work/sglang_python"
    printf '#!/usr/bin/env bash\nPYTHONPATH="%s${PYTHONPATH:+:$PYTHONPATH}" exec "%s" "$@"\n' "$site" "$(command -v "$python")" >"$sglang_python"
    chmod +x "$sglang_python"
fi

{
    date -u +%FT%TZ
    nvidia-smi
    "$python" -c 'import sys, torch; print(sys.version, torch.__version__, torch.cuda.is_available() and torch.cuda.get_device_name())'
} >"$out/machine.txt" 2>&1
tail -n 1 "$out/machine.txt"

run="$work/run" # with a checkpoint of some gigabytes, which stays here
options=(--run_dir "$run" --trainer.sleep on --rollout.sglang.release all --log.progress False --log.tensorboard False)
[[ -z $sglang_python ]] || options+=(--rollout.sglang.python "$sglang_python")
if ((on_cpu)); then
    options+=(--steps "${STEPS:-2}" --rollout.sglang.attention_backend None --rollout.sglang.extra_args)
    options+=(--model.num_layers 2 --model.hidden_size 64 --model.intermediate_size 96 --model.head_dim 16 --model.num_attention_heads 4)
    options+=(--model.num_key_value_heads 2 --model.context_length 128 --rollout.max_response_tokens 32 --rollout.max_batch 16)
    options+=(--sampling.groups_in_flight 4 --replay.groups_per_update 4 --sampling.num_samples 4 --trainer.dtype float32 --trainer.microbatch_tokens 512)
else
    options+=(--steps "${STEPS:-5}" --rollout.sglang.attention_backend "${ATTENTION:-triton}")
    options+=(--rollout.sglang.start_timeout_s "${START_TIMEOUT_S:-240}") # then its log is shown, and not a run that was cut off
    options+=(--swap.sleep_budget_bytes "${SLEEP_BUDGET_BYTES:-$((8 << 30))}")
    options+=("--rollout.sglang.extra_args=--sampling-backend=${SAMPLING:-pytorch}") # of two words the first would be taken for an option
fi
timeout --kill-after=10 "${TIMEOUT_S:-540}" "$python" -m tandem.engine.train gpu_loop "${options[@]}" >"$out/loop.log" 2>&1
status=$?
((status == 0)) || { echo "failed: status $status"; tail -n 25 "$out/loop.log"; tail -n 25 "$run"/logs/engine_*.log 2>/dev/null; }
"$python" benchmarks/loop_table.py "$run" --jsonl "$out/loop.jsonl" >"$out/loop.md" || status=1
tar czf "$out/run.tgz" -C "$run" --exclude ./checkpoints --exclude ./data --exclude ./replay . || status=1
cat "$out/loop.md"
echo "done in ${SECONDS}s, status $status; results in $out"
exit $((status != 0))
