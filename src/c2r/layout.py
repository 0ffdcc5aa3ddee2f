"""The names of everything in a run's folder, once.

```text
runs/mine/
  run.yaml  metrics.jsonl         the configuration; a line of figures every few steps
  checkpoints/step_*/state.json, tensors.safetensors      to resume from
  faulty/                         batches that produced NaN
  tensorboard/  wandb/            if tracking is on
  <sae>/cfg.json  <sae>/sae_weights.safetensors
  evaluations/<sae>_core.json     a file per SAE and evaluation
  evaluations/earlier/            results that newer ones with other settings have replaced
  summary.json  known_features/  known_features.json  report.html      written by the demo
```
"""

from __future__ import annotations

RUN_FILE, METRICS_FILE = "run.yaml", "metrics.jsonl"
CHECKPOINTS, FAULTY = "checkpoints", "faulty"
TENSORBOARD, WANDB = "tensorboard", "wandb"
SAE_CONFIG, SAE_WEIGHTS = "cfg.json", "sae_weights.safetensors"
STATE, TENSORS = "state.json", "tensors.safetensors"
EVALUATIONS, EARLIER = "evaluations", "earlier"
SUMMARY_FILE, KNOWN_FEATURES, KNOWN_FEATURES_FILE, REPORT_FILE = (
    "summary.json", "known_features", "known_features.json", "report.html",
)  # fmt: skip
RESERVED = (
    RUN_FILE, METRICS_FILE, SUMMARY_FILE, REPORT_FILE, EVALUATIONS, CHECKPOINTS, KNOWN_FEATURES, KNOWN_FEATURES_FILE,
    FAULTY, TENSORBOARD, WANDB,
)  # fmt: skip
"""Names that no SAE of a run can have."""
