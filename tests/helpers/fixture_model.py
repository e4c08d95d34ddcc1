"""The model of ``tests/data/reference-checkpoints`` and what its folders hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

FIXTURES = Path(__file__).parents[1] / "data" / "reference-checkpoints"


class FixtureModel(nn.Module):
    """As the README beside the folders describes it; ``seed`` is that of the reference's run."""

    def __init__(self, seed: int = 7) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(37, 24)
        self.up = nn.Linear(24, 51)
        self.frozen = nn.Linear(51, 51, bias=False)
        self.frozen.weight.requires_grad_(False)
        self.down = nn.Linear(51, 24)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 37, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor([1.5]))

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        y = self.down(self.frozen(nn.functional.gelu(self.up(x))) * self.scale.to(x.dtype))
        logits = self.head(self.norm(x + y)).float()
        return nn.functional.cross_entropy(logits.view(-1, 37), labels.view(-1))


def facts(name: str) -> dict[str, Any]:
    return json.loads((FIXTURES / name / "facts.json").read_text())


def expected_weights(name: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(FIXTURES / name / "expected.safetensors")


def rank_batches(name: str, rank: int) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    return torch.load(FIXTURES / name / "batches.pt", weights_only=True)[rank]
