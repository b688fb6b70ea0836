#!/usr/bin/env bash
# Outcome, Process and sparse GRPO on real language models: the same start, the same number of traces, accuracy on
# held-out problems before and after with intervals, and all traces in one HTML file.
#
#   experiments/gsm8k.sh MODEL TRAIN DEV OUT [flags of exprl.py]
#   experiments/gsm8k.sh Qwen2.5-0.5B-Instruct openai/gsm8k:main:train gsm8k_dev.jsonl runs/gsm8k \
#       --judge Qwen3-4B-Instruct-2507                                                                    # one GPU
#   experiments/gsm8k.sh /folder/SmolLM2-135M-Instruct gsm8k_train.jsonl gsm8k_dev.jsonl /tmp/gsm8k --steps 1 \
#       --questions 2 --group 2 --max-new-tokens 48 --eval-limit 2 --eval-n 2 --eval-k 1 2                # that it works
# Without --judge the start judges itself; below 3B parameters by likelihoods, see README.md.
# With HARD="--n 8 --limit 2000", flags of sample.py, it trains, as the paper does, on hard problems: those of TRAIN of
# which the start solves none so.
set -euo pipefail
[ $# -ge 4 ] || { sed -n 's/^#   //p' "$0" >&2; exit 2; }
model=$1 train=$2 dev=$3 out=$4
shift 4
mkdir -p "$out"
absolute() { case $1 in /*) printf %s "$1" ;; *) printf %s "$PWD/$1" ;; esac; } # links stay: a suffix counts
for name in model train dev out; do # what is a file or a folder here stays it after cd; a hub id stays as it is
  [ ! -e "${!name}" ] || printf -v "$name" %s "$(absolute "${!name}")"
done
case ${PYTHON:-} in */*) PYTHON=$(absolute "$PYTHON") ;; esac
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
if [ -n "${HARD:-}" ]; then
  [ -e "$out/hard.jsonl" ] || "$python" sample.py --model "$model" --data "$train" --temperature 0.8 \
    --max-new-tokens 512 --out "$out/hard.traces.jsonl" $HARD --unsolved "$out/hard.jsonl"
  train=$out/hard.jsonl
fi
for method in outcome process grpo; do
  [ ! -e "$out/$method/model" ] || { echo "kept, it was run before: $out/$method" >&2; continue; }
  if [ -e "$out/$method/config.json" ]; then # stopped before
    "$python" exprl.py --resume "$out/$method"
  else
    "$python" exprl.py --model "$model" --data "$train" --eval-data "$dev" --method "$method" --steps 100 \
      --questions 32 --group 8 --max-new-tokens 512 --lr 2e-6 --eval-every 50 --eval-limit 400 --eval-n 4 \
      --eval-k 1 4 --save-every 50 --out "$out/$method" "$@"
  fi
done
"$python" experiments/report.py "$out/outcome" "$out/process" "$out/grpo" --out "$out/report.html"
