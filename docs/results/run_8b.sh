#!/usr/bin/env bash
# uvit-8b at 256² on one 139 GiB GPU: 20 steps, then throughput, MFU and memory in docs/results/run-8b.json.
# Run it from the repository's root after installation:  bash docs/results/run_8b.sh [FEATURES] [overrides...]
# FEATURES: shards by `longskip data encode` of (4, 32, 32) latents and (77, 1024) CLIP features; without one, small random
# encoders make 512 (speed does not depend on the values).
# Memory by `longskip train configs/uvit-8b.yaml --dry-run --ranks 1 train.batch_size=64 train.micro_batch=16`: about 125.7 GiB
# on the card in the optimizer's step (bf16 weights and gradients 29.7, fp32 masters and moments 89.1, DeepSpeed's buffers
# 6.9), 29.7 GiB of EMA in host memory.
set -euo pipefail
cd "$(dirname "$0")/../.."
features=${1:-data/features-8b}
shift || true
if [ ! -f "$features/index.json" ]; then
  python -m tests.rehearsal --features "$features" 512
fi
rm -rf runs/run-8b
# checkpoint.every=0: a checkpoint of this size is 119 GiB
longskip train configs/uvit-8b.yaml "data.path=$features" train.name=run-8b train.steps=20 \
  train.batch_size=64 train.micro_batch=16 optim.warmup_steps=5 logging.every=1 checkpoint.every=0 eval.every=0 "$@"
python - <<'PY'
import json
import statistics
from pathlib import Path

run = Path("runs/run-8b")
lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
warm = lines[5:]  # the first steps allocate and tune
memory = next(key for key in lines[-1] if key.startswith("memory/max"))
result = {
    "command": "bash docs/results/run_8b.sh",
    "environment": json.loads((run / "environment.json").read_text()),
    "device": next(line["device_name"] for line in ledger if "device_name" in line),
    "parameters": json.loads((run / "run.json").read_text())["params"],
    "losses": [line["loss/global_avg"] for line in lines],
    "images_per_second": {"median": statistics.median(line["images_per_second"] for line in warm),
                          "all": [line["images_per_second"] for line in warm]},
    "mfu_percent": statistics.median(line["mfu(%)"] for line in warm) if "mfu(%)" in lines[-1] else None,
    "hfu_percent": statistics.median(line["hfu(%)"] for line in warm) if "hfu(%)" in lines[-1] else None,
    memory: lines[-1][memory],
}
Path("docs/results/run-8b.json").write_text(json.dumps(result, indent=1) + "\n")
print(json.dumps({key: result[key] for key in ("device", "mfu_percent", "hfu_percent", memory)}))
PY
