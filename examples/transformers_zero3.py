"""Train a small GPT-2 of Transformers on ZeRO-3, on any number of ranks, with or without GPUs, and without the network.

    deepspeed --num_gpus 2 examples/transformers_zero3.py --output runs/gpt2

The model is partitioned while it is constructed: no rank ever holds all of it. The Trainer needs nothing but the config;
`"auto"` stands for what its arguments say. The text is Python's own standard library, one token a byte.
"""

from __future__ import annotations

import argparse

import torch
from gpt import VOCAB, stdlib_text, windows
from transformers import AutoModelForCausalLM, GPT2Config, Trainer, TrainingArguments, set_seed

ZERO3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,  # for save_model
    },
}


class Windows(torch.utils.data.Dataset):
    """Pieces of a text, spread over all of it."""

    def __init__(self, text: torch.Tensor, count: int, context: int) -> None:
        self.text, self.count, self.context = text, count, context

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        x, _ = windows(self.text, number, 1, self.context)
        return {"input_ids": x[0], "labels": x[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/transformers_zero3", help="where the trained model is written")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--local_rank", type=int, default=-1, help="given by the launcher")
    args = parser.parse_args()

    # First the arguments: a model that is made while they are alive is partitioned at once.
    training = TrainingArguments(
        args.output,
        deepspeed=ZERO3,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        ddp_backend="nccl" if torch.cuda.is_available() else "gloo",
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        learning_rate=3e-3,
        warmup_steps=5,
        max_grad_norm=1.0,
        max_steps=args.steps,
        logging_steps=25,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    set_seed(0)
    shape = GPT2Config(
        vocab_size=VOCAB, n_positions=args.context, n_embd=args.width, n_layer=args.layers, n_head=args.width // 32,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(shape)
    train, validation = stdlib_text()
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=Windows(train, 8 * args.steps * training.world_size, args.context),
        eval_dataset=Windows(validation, 64, args.context),
    )
    rank = training.process_index
    if rank == 0:
        shards = sum(p.ds_tensor.numel() for p in model.parameters())
        print(f"{model.num_parameters()} parameters, of which this rank holds {shards}")
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]

    prompt = torch.tensor([list(b"def ")], device=training.device)
    made = model.generate(prompt, max_length=args.context, temperature=0.7, do_sample=True, synced_gpus=True)
    trainer.save_model(args.output)
    if rank == 0:
        print(f"validation loss {loss:.3f}; saved to {args.output}")
        print(bytes(made[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
