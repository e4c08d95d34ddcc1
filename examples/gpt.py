"""A byte-level GPT in plain PyTorch, and the text it learns: the sources of Python's own standard library.

Nothing here knows of deepspeed: `train_gpt.py` trains this model with it, `eval_plain_torch.py` loads the result without.
"""

from __future__ import annotations

import sysconfig
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

VOCAB = 256  # one token a byte: no tokenizer, and the loss is in nats per byte


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, C/heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """`model(x)` gives logits (B, T, VOCAB); `model(x, y)` gives the mean loss in nats per byte, a float32 scalar.

    Width is a multiple of 64, the size of a head. The defaults make 3.26 M parameters.
    """

    def __init__(self, layers: int = 4, width: int = 256, context: int = 128) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, width // 64) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB, bias=False)
        self.head.weight = self.tokens.weight  # tied
        for name, p in self.named_parameters():
            if p.dim() == 2:  # the last layer of a residual branch starts smaller, so that depth does not add variance
                nn.init.normal_(
                    p, std=0.02 / (2 * layers) ** 0.5 if name.endswith(("proj.weight", "down.weight")) else 0.02
                )

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        logits = self.head(self.norm(h))
        if y is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())


def stdlib_text() -> tuple[torch.Tensor, torch.Tensor]:
    """(train, validation): uint8 bytes of the standard library's sources; whole files, one in sixteen held out."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "lib2to3", "idlelib", "encodings"}
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not skip.intersection(name.parts):
            parts[zlib.crc32(name.as_posix().encode()) % 16 == 0].append(path.read_bytes())
    train, validation = (torch.frombuffer(bytearray(b"".join(p)), dtype=torch.uint8) for p in parts)
    return train, validation


def windows(text: torch.Tensor, first: int, count: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples number first .. first+count-1 as (x, y), each (count, length) int64; y is x moved on by one byte.

    A sample's number alone says where it lies (strides of the golden ratio spread over the text), so a run takes the
    same samples at any number of ranks, and a resumed one goes on with those that it has not seen.
    """
    fraction = torch.arange(first, first + count, dtype=torch.float64) * 0.6180339887498949 % 1.0
    start = (fraction * (len(text) - length - 1)).long()
    block = text[start[:, None] + torch.arange(length + 1)].long()
    return block[:, :-1], block[:, 1:]


@torch.no_grad()
def validation_loss(model: nn.Module, text: torch.Tensor, context: int) -> float:
    """Mean loss, in nats per byte, over 256 fixed windows. The same call works on an engine and on the bare model."""
    model.eval()
    losses = [model(*windows(text, first, 16, context)) for first in range(0, 256, 16)]
    model.train()
    return torch.stack(losses).mean().item()


@torch.no_grad()
def sample(model: nn.Module, prompt: str, length: int, context: int, device: torch.device | str = "cpu") -> str:
    """The prompt and `length` more bytes, drawn at temperature 0.7; the same text at every call."""
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([list(prompt.encode())])
    for _ in range(length):
        logits = model(x[:, -context:].to(device))[0, -1].float().cpu()
        x = torch.cat([x, torch.multinomial((logits / 0.7).softmax(-1), 1, generator=generator)[None]], dim=1)
    return bytes(x[0].tolist()).decode(errors="replace")
