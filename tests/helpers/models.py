"""Small models that contain what goes wrong: tied, reused, unused, frozen, odd-sized and zero-sized parameters."""

from __future__ import annotations

import torch
from torch import nn


class Tricky(nn.Module):
    """Odd sizes; options add the difficult kinds of parameters. Input (batch, 13) floats, target (batch,) classes of 7."""

    def __init__(self, *, tied=False, reused=False, unused=False, frozen=False, lora=False) -> None:
        super().__init__()
        self.options = {"tied": tied, "reused": reused, "unused": unused, "frozen": frozen, "lora": lora}
        self.inp = nn.Linear(13, 11)
        self.mid = nn.Linear(11, 11)
        self.norm = nn.LayerNorm(11)
        self.extra = nn.Linear(11, 11) if unused else None
        self.back = nn.Linear(11, 13, bias=False)
        self.head = nn.Linear(13, 7)
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.scalar = nn.Parameter(torch.tensor(1.5))
        if tied:
            self.tied_back = nn.Linear(13, 11, bias=False)
            self.tied_back.weight = self.inp.weight
        if frozen:
            self.mid.weight.requires_grad_(False)
        if lora:
            for param in self.parameters():
                param.requires_grad_(False)
            self.lora_a = nn.Linear(13, 3, bias=False)
            self.lora_b = nn.Linear(3, 11, bias=False)
        self.register_buffer("shift", torch.full((11,), 0.25))

    def forward(self, x: torch.Tensor, target: torch.Tensor, use_extra: bool = True) -> torch.Tensor:
        x = x.to(self.inp.weight.dtype)
        h = torch.tanh(self.inp(x)) * self.scalar + self.shift.to(x.dtype)
        if self.options["lora"]:
            h = h + self.lora_b(self.lora_a(x))
        h = torch.tanh(self.mid(h))
        if self.options["reused"]:
            h = torch.tanh(self.mid(h)) + self.mid(h * 0.5)
        if self.extra is not None and use_extra:
            h = h + self.extra(h)
        h = self.norm(h)
        out = self.back(h)
        if self.options["tied"]:
            out = out + torch.tanh(self.tied_back(x)) @ self.inp.weight
        return nn.functional.cross_entropy(self.head(out).float(), target)


def batches(rank: int, count: int, size: int = 4, seed: int = 0):
    """``count`` micro-batches of this rank, the same on every call."""
    made = []
    for i in range(count):
        g = torch.Generator().manual_seed(seed * 7919 + rank * 101 + i)
        made.append((torch.randn(size, 13, generator=g), torch.randint(0, 7, (size,), generator=g)))
    return made
