#!/bin/sh
# transformers 5.23.0: a training that is resumed from the checkpoint of its last step does one step more than max_steps.
#
# Jobs that are started again after a kill call train(resume_from_checkpoint=...). If the kill came after the last
# checkpoint was written, nothing is left to do. When max_steps falls inside an epoch, Trainer runs another batch all the
# same, changes the weights, and returns global_step = max_steps + 1. At the end of an epoch it does no step.
#
# Seen on 2026-11-29, Linux, torch 2.13.0 on a CPU, accelerate 1.15.0:
#   max_steps 6, 5 batches in an epoch: 6 steps; resumed from checkpoint-6: 7 steps, weights changed: True
#   max_steps 5, 5 batches in an epoch: 5 steps; resumed from checkpoint-5: 5 steps, weights changed: False
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 accelerate==1.15.0 torch==2.13.0
cat > "$folder/run.py" <<'PYTHON'
import sys

import torch
from torch import nn
from transformers import Trainer, TrainingArguments


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(1, 1)

    def forward(self, x, labels):
        y = self.a(x)
        return {"loss": (y - labels).square().mean(), "logits": y}


data = [{"x": torch.tensor([float(i)]), "labels": torch.tensor([2.0 * i])} for i in range(5)]


def trained(steps, resume):
    arguments = TrainingArguments(
        f"{sys.argv[1]}/{steps}", max_steps=steps, per_device_train_batch_size=1, save_steps=steps, learning_rate=0.01,
        lr_scheduler_type="constant", report_to="none", disable_tqdm=True, use_cpu=True, logging_strategy="no",
    )
    trainer = Trainer(Line(), arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=f"{arguments.output_dir}/checkpoint-{steps}" if resume else None)
    return trainer.state.global_step, trainer.model.a.weight.item()


found = {}
for steps in (6, 5):
    done, before = trained(steps, False)
    again, after = trained(steps, True)
    found[steps] = again
    told = f"resumed from checkpoint-{steps}: {again} steps, weights changed: {before != after}"
    print(f"max_steps {steps}, 5 batches in an epoch: {done} steps; {told}", file=sys.stderr)
    assert done == steps
assert found == {6: 7, 5: 5}, found
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/run.py" "$folder/out" 2>"$folder/log" >/dev/null || { cat "$folder/log"; exit 1; }
grep '^max_steps' "$folder/log"
