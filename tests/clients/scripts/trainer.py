"""What a user launches: a Trainer whose arguments come from the command line."""

import json
from pathlib import Path

from transformers import HfArgumentParser, Trainer, TrainingArguments

from tests.helpers.clients import Sequences, tiny_gpt2

(arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
trainer = Trainer(model=tiny_gpt2(), args=arguments, train_dataset=Sequences(32), eval_dataset=Sequences(16, seed=5))
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
report = {"engine": type(trainer.model_wrapped).__name__, "ranks": arguments.world_size, "losses": losses}
Path(arguments.output_dir, f"rank{arguments.process_index}.json").write_text(json.dumps(report))
