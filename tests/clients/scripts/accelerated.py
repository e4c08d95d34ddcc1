"""What a user launches: a loop that learns about DeepSpeed from the environment that ``accelerate launch`` sets."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from tests.helpers.clients import Sequences, tiny_gpt2

accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
model = tiny_gpt2()
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
model, optimizer, data = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(Sequences(32), batch_size=4))
losses = []
for _ in range(3):
    for batch in data:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss))
report = {
    "engine": type(model).__name__,
    "ranks": accelerator.num_processes,
    "losses": losses,
    "stage": model.zero_optimization_stage(),
    "accumulation": model.gradient_accumulation_steps(),
    "steps": model.global_steps,
}
Path(sys.argv[1], f"rank{accelerator.process_index}.json").write_text(json.dumps(report))
torch.distributed.destroy_process_group()
