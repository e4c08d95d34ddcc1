"""Train a byte-level GPT on the standard library's sources, on any number of ranks, with any config file.

    deepspeed --num_gpus 2 examples/train_gpt.py --deepspeed --deepspeed_config examples/configs/zero2.json --save runs/a
    deepspeed --num_gpus 2 examples/train_gpt.py --deepspeed --deepspeed_config examples/configs/zero2.json \\
        --resume runs/a --steps 600 --export runs/a/weights --sample 200

`torchrun --nproc_per_node 2 examples/train_gpt.py ...` does the same. Without a GPU the ranks train on the CPU.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import psutil
import torch
from gpt import GPT, sample, stdlib_text, validation_loss, windows

import deepspeed
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="train up to this step, counted from the very first")
    parser.add_argument("--save", metavar="DIR", help="write a checkpoint here at the end")
    parser.add_argument("--resume", metavar="DIR", help="go on from the latest checkpoint in this folder")
    parser.add_argument("--export", metavar="DIR", help="write consolidated fp32 weights here at the end")
    parser.add_argument(
        "--sample", type=int, metavar="BYTES", default=0, help="print a sample of this length at the end"
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--context", type=int, default=128, help="bytes the model looks back")
    parser.add_argument("--print_every", type=int, default=25, metavar="STEPS")
    parser.add_argument("--local_rank", type=int, default=-1, help="given by the launcher")
    return deepspeed.add_config_arguments(parser).parse_args()


def memory_mb(device: torch.device) -> float:
    """Peak allocated memory of this rank's device; on the CPU, the resident memory of the process."""
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return used / 1e6


def main() -> None:
    args = parse()
    torch.manual_seed(0)  # the same first weights on every rank and in every run
    model = GPT(args.layers, args.width, args.context)
    engine, _, _, _ = deepspeed.initialize(args=args, model=model, model_parameters=model.parameters())
    rank, world = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    micro, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    train_text, validation_text = (text.to(engine.device) for text in stdlib_text())

    def say(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    parameters = sum(p.numel() for p in model.parameters())
    say(
        f"{parameters / 1e6:.2f} M parameters, {len(train_text) / 1e6:.1f} MB of text, {world} ranks on {engine.device}"
    )
    if args.resume:
        _, state = engine.load_checkpoint(args.resume)
        now, before = validation_loss(engine, validation_text, args.context), state["validation_loss"]
        say(f"resumed at step {engine.global_steps}: validation loss {now:.4f}, was {before:.4f} when saved")
        if abs(now - before) > 0.02:
            raise RuntimeError(f"the checkpoint in {args.resume} does not continue where it stopped")

    started, since = time.perf_counter(), engine.global_steps
    for step in range(engine.global_steps, args.steps):
        for part in range(accumulation):
            number = ((step * accumulation + part) * world + rank) * micro  # of this rank's first sample
            loss = engine(*windows(train_text, number, micro, args.context))
            engine.backward(loss)
            engine.step()
        if (step + 1) % args.print_every == 0 or step + 1 == args.steps:
            deepspeed.comm.all_reduce(loss := loss.detach())
            speed = (step + 1 - since) * engine.train_batch_size() * args.context / (time.perf_counter() - started)
            say(
                f"step {step + 1:5d} | loss {loss.item() / world:.4f} | lr {engine.get_lr()[0]:.2e} | {speed:6.0f} tokens/s"
                f" | grad norm {engine.get_global_grad_norm() or 0.0:.3f} | memory {memory_mb(engine.device):.0f} MB"
            )
            started, since = time.perf_counter(), step + 1

    final = validation_loss(engine, validation_text, args.context)
    say(f"step {engine.global_steps}: validation loss {final:.4f} nats per byte")
    if args.save:
        engine.save_checkpoint(args.save, client_state={"validation_loss": final})
        if rank == 0:
            facts = {
                "step": engine.global_steps,
                "validation_loss": final,
                "dtype": str(next(model.parameters()).dtype),
            }
            Path(args.save, "result.json").write_text(json.dumps(facts))
        say(f"saved to {args.save}")
    if args.export and rank == 0:
        convert_zero_checkpoint_to_fp32_state_dict(args.save or args.resume, args.export)
    if args.sample:
        say(sample(engine, "def ", args.sample, args.context, engine.device))
    engine.destroy()


if __name__ == "__main__":
    main()
