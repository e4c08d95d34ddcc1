"""A tiny GPT-2 and its data for the client tests, and ranks that find each other as clients expect: by environment."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from tests.helpers.dist import run_ranks

VOCABULARY, LENGTH = 48, 12


class Sequences(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Counting with a stride of 1 to 3, so that there is something to learn."""

    def __init__(self, size: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randint(0, VOCABULARY, (size, 1), generator=generator)
        stride = torch.randint(1, 4, (size, 1), generator=generator)
        self.rows = (start + stride * torch.arange(LENGTH)) % VOCABULARY

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def tiny_gpt2(seed: int = 0, dropout: float = 0.0) -> GPT2LMHeadModel:
    set_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=2,
            n_embd=32,
            n_head=2,
            vocab_size=VOCABULARY,
            n_positions=LENGTH,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def assert_weights_close(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], atol: float) -> None:
    """But for the keys' biases, which the softmax cancels: their gradients are rounding noise, which Adam makes large."""
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        other = two[name]
        if name.endswith("c_attn.bias"):
            queries, _, values = tensor.chunk(3)
            tensor, other = torch.cat([queries, values]), torch.cat([other.chunk(3)[0], other.chunk(3)[2]])
        torch.testing.assert_close(tensor, other, rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


def assert_identical(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_clients(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 300, **kwargs: Any
) -> list[Any]:
    """``run_ranks`` without a process group, but with what a launcher would have set."""
    return run_ranks(_launched, world_size, free_port(), fn, args, kwargs, init=False, timeout_s=timeout_s)


def _launched(rank: int, world_size: int, port: int, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(world_size))
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Accelerate has no other way to use the CPU where there is a GPU
    return fn(rank, world_size, *args, **kwargs)
