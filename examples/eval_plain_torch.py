"""Load exported fp32 weights in plain PyTorch, with no deepspeed, and check the validation loss against the training's.

python examples/eval_plain_torch.py runs/demo/weights --expect runs/demo/result.json --below 2.4
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
from gpt import GPT, sample, stdlib_text, validation_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="pytorch_model.bin, or the folder that holds it")
    parser.add_argument("--expect", type=Path, help="result.json that train_gpt.py left with the checkpoint")
    parser.add_argument("--below", type=float, help="fail if the validation loss is not below this, in nats per byte")
    parser.add_argument("--sample", type=int, metavar="BYTES", default=0)
    args = parser.parse_args()

    path = args.weights / "pytorch_model.bin" if args.weights.is_dir() else args.weights
    weights = torch.load(path, weights_only=True)
    kinds = {str(w.dtype) for w in weights.values()}
    context, width = weights["positions.weight"].shape
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    model = GPT(layers, width, context)
    model.load_state_dict(weights)
    _, text = stdlib_text()

    loss = validation_loss(model, text, context)
    print(f"plain torch, {', '.join(kinds)}: validation loss {loss:.4f} nats per byte")
    if kinds != {"torch.float32"}:
        sys.exit(f"expected consolidated weights in torch.float32, but {path} has {', '.join(kinds)}")
    if args.expect:
        result = json.loads(args.expect.read_text())
        dtype, expected = getattr(torch, result["dtype"].removeprefix("torch.")), result["validation_loss"]
        rounded = validation_loss(copy.deepcopy(model).to(dtype), text, context)  # as the training evaluated it
        print(f"plain torch, {dtype}: validation loss {rounded:.4f}; the training had {expected:.4f}")
        if abs(rounded - expected) > 1e-3 or abs(loss - expected) > 2e-2:
            sys.exit("the exported weights do not have the validation loss of the training")
    if args.below is not None and not loss < args.below:
        sys.exit(f"expected a validation loss below {args.below}, got {loss:.4f}")
    if args.sample:
        print(sample(model, "def ", args.sample, context))
    if "deepspeed" in sys.modules:
        sys.exit("deepspeed was imported: this check means nothing")


if __name__ == "__main__":
    main()
