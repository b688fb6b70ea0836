#!/usr/bin/env bash
# Everything that wants a GPU, in one command: tests of the kernels, their benchmarks, the sampler beside
# transformers, a step beside TRL (where it is installed), the memory of a full-length step, and training runs.
#
#   experiments/gpu.sh OUT MODEL TRAIN DEV [PART ...]      # PARTs: tests decode kernels step memory sampler train
#   experiments/gpu.sh results-h200 Qwen2.5-0.5B-Instruct gsm8k_train.jsonl gsm8k_dev.jsonl
#
# Each part writes its log and its CSV into OUT; one that fails does not keep the others from running, and the
# script says at the end which did. PYTHON names the interpreter; without it, .venv's. FLAGS go to exprl.py:
# FLAGS="--judge Qwen3-4B-Instruct-2507" where that model is at hand; without, MODEL judges itself. HARD: see gsm8k.sh.
# Where a machine is lent for minutes: LIMIT=90 ends each command after so many seconds, and TAR=FILE.tgz holds, after
# each of them, all that OUT does by then.
set -uo pipefail
[ $# -ge 4 ] || { sed -n 's/^#   //p' "$0" >&2; exit 2; }
out=$1 model=$2 train=$3 dev=$4
shift 4
parts=(${*:-tests decode kernels step memory sampler train})
mkdir -p "$out"
out=$(cd "$out" && pwd)
absolute() { case $1 in /*) printf %s "$1" ;; *) printf %s "$PWD/$1" ;; esac; } # links stay: a suffix counts
for name in model train dev; do # what is a file or a folder here stays it after cd; a hub id stays as it is
  [ ! -e "${!name}" ] || printf -v "$name" %s "$(absolute "${!name}")"
done
case ${PYTHON:-} in */*) PYTHON=$(absolute "$PYTHON") ;; esac
[ -z "${TAR:-}" ] || TAR=$(absolute "$TAR")
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
failed=()

run() { # name command...
  echo "== $1: ${*:2}"
  ${LIMIT:+timeout -k 10 "$LIMIT"} "${@:2}" 2>&1 | tee "$out/$1.log" || failed+=("$1")
  [ -z "${TAR:-}" ] || tar czf "$TAR" -C "$out" .
}

"$python" - <<'PY' | tee "$out/machine.txt" || exit
import datetime, math_verify, torch, transformers
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU", "torch", torch.__version__,
      "transformers", transformers.__version__, datetime.date.today())
PY
for part in "${parts[@]}"; do
  case $part in
    tests)
      run tests "$python" -m pytest -m gpu -q
      run kernel_tests "$python" -m pytest -q tests/test_layer_ops.py tests/test_p*_attention.py \
        tests/test_policy_head.py tests/test_kernels.py -k "not compile" ;;
    decode) run decode "$python" experiments/bench_sampler.py --what steps ragged --data "$dev" \
      --out "$out/sampler_bench.csv" ;;
    kernels)
      for kernel in token_advantages paged_attention prefill_attention choose_token; do
        run $kernel "$python" experiments/bench_kernels.py $kernel
      done
      run head "$python" experiments/bench_head.py --csv "$out/head_bench.csv" ;;
    sampler) run sampler "$python" experiments/bench_sampler.py --what sampling judging --model "$model" \
      --judge "$model" --data "$dev" --out "$out/sampler_bench.csv" ;;
    step)
      ways=(exprl)
      "$python" -c 'import datasets, trl' 2>/dev/null && ways+=(trl)
      run step "$python" experiments/vs_trl.py --ways "${ways[@]}" --model "$model" --data "$train" \
        --out "$out/vs_trl.csv" ;;
    memory) run memory "$python" exprl.py --dry-run --model "$model" --data "$train" ${FLAGS:-} ;;
    train) run train env PYTHON="$python" experiments/gsm8k.sh "$model" "$train" "$dev" "$out/gsm8k" ${FLAGS:-} ;;
    *) echo "no part $part: tests decode kernels step memory sampler train" >&2; exit 2 ;;
  esac
done
echo "done: ${parts[*]}${failed:+; failed: ${failed[*]}}"
[ -z "${failed:-}" ]
