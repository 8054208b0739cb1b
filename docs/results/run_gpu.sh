#!/usr/bin/env bash
# Everything that waits for a GPU, in two calls of at most ten minutes each, from the root of a checkout:
#   bash docs/results/run_gpu.sh kernels OUT     GPU tier of the kernels' tests, tuning, benchmarks beside the rivals
#   bash docs/results/run_gpu.sh training OUT    what is left of the benchmarks, then docs/results/run_8b.sh
# Needs python with torch and triton for the first; the packages of `pip install .` for the second. PYTHON names the
# interpreter, COMMIT what to write as the commit where there is no repository. OUT takes JSON, CSV, logs and the tuned
# table; copy the table to longskip/kernels/tuned/ and the rest to docs/results/.
set -uo pipefail
what=${1:?kernels or training}
out=$(realpath -m "${2:?a folder for the results}")
python=${PYTHON:-python3}
commit=${COMMIT:-$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)}
mkdir -p "$out"
export PYTHONPATH=. XDG_CACHE_HOME="$out/cache" DS_ACCELERATOR=cuda
failed=0

step() {  # name, seconds, command…: its output to a log, its verdict to the screen
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then
    echo "$name: done in $((SECONDS - begin)) s"
  else
    echo "$name: FAILED ($?) after $((SECONDS - begin)) s; $(tail -n 2 "$out/$name.log" | tr '\n' ' ')"
    failed=1
  fi
}

bench() {  # name, seconds, options…
  local name=$1 limit=$2
  shift 2
  step "bench-$name" "$limit" "$python" -m longskip.profiling.bench --commit "$commit" --out "$out/kernels-$name.json" "$@"
}

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm --format=csv,noheader | tee "$out/device.txt"
case $what in
  kernels)
    step tests 160 "$python" -m pytest -q -m gpu tests/gpu -k "not sanitizer"
    bench rows 110 --tune --save --op adaln --op gated_adaln --op gated_residual --op layer_norm --op rms_norm --op diffusion_loss
    bench attention 150 --tune --save --op attention --op qk_norm_rotary
    bench products 110 --tune --save --op skip_linear --op mlp --op swiglu --op adamw
    bench packed 50 --no-sweep --op attention_varlen
    ;;
  training)
    step sanitizer 120 "$python" -m pytest -q -m gpu tests/gpu -k sanitizer
    step 8b 440 bash docs/results/run_8b.sh "$out/features"
    ;;
  *)
    echo "first argument: kernels or training" >&2
    exit 2
    ;;
esac
exit $failed
