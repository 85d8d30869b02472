#!/usr/bin/env bash
# All benchmarks on a CUDA machine, in bf16, for alpha-nano and alpha-synthetic. One JSON file each in $OUT.
#
#   benchmarks/gpu.sh               # everything
#   benchmarks/gpu.sh nano joint    # only the parts whose name holds one of these words
#
# Needs torch, pydantic, numpy, tokenizers, safetensors, pyyaml and click, the engine_speed parts also deepspeed, pyarrow
# and psutil; PYTHON=python3.12 picks the interpreter, and
# COMMIT=abc1234 names the commit where the tree has no git. A part that fails does not stop the others; the script then
# ends with 1 and names them. It stops at LIMIT seconds (default 3600): what was running then, and what had not begun, has
# failed; the slowest to start, compiled generation, comes last.
set -u
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
out="${OUT:-gpu_results}"
mkdir -p "$out" || exit 1
limit="${LIMIT:-3600}"
words=("$@")
failed=()

part() { # NAME SCRIPT OPTIONS...: one benchmark, whose results are $out/NAME.json
  local name="$1" script="$2" word wanted=$((${#words[@]} == 0)) left code
  shift 2
  for word in ${words[@]+"${words[@]}"}; do [[ "$name" == *"$word"* ]] && wanted=1; done
  ((wanted)) || return 0
  left=$((limit - SECONDS))
  echo
  echo "== $name ($left s left)"
  if ((left > 0)); then
    timeout "$left" "${PYTHON:-python3}" "benchmarks/$script.py" --device cuda --dtype bf16 --json "$out/$name.json" "$@"
    code=$?
  else
    code=124
  fi
  if ((code)); then failed+=("$name (exit $code$( ((code == 124)) && echo ', out of time'))"); fi
}

graphs=(--execution eager --execution cuda_graph)
part moe-nano moe
part moe-synthetic moe --experts 28 --per-token 4 --hidden 256 --inner 512
part generation-nano generation --preset alpha-nano "${graphs[@]}"
part generation-synthetic generation --preset alpha-synthetic "${graphs[@]}"
part joint_step-nano joint_step --preset alpha-nano --batch 128 --compile
part joint_step-synthetic joint_step --preset alpha-synthetic --batch 64 --compile
part engine_speed-nano engine_speed --preset alpha-nano --batch 256 --steps 30 --compile
part engine_speed-synthetic engine_speed --preset alpha-synthetic --batch 64 --steps 30 --compile
# Sixteen conversations at once: one alone is too little work for such a device to tell a long history from a short one.
part latency_by_turn-nano latency_by_turn --preset alpha-nano --batch 16 --repeats 3 "${graphs[@]}"
part latency_by_turn-synthetic latency_by_turn --preset alpha-synthetic --batch 16 --repeats 2 "${graphs[@]}"
part generation_compiled-nano generation --preset alpha-nano --execution eager --execution compile
part generation_compiled-synthetic generation --preset alpha-synthetic --execution eager --execution compile

echo
if ((${#failed[@]})); then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
echo "all parts done in $SECONDS s; results in $out"
