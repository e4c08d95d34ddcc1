"""Symmetric block-wise quantisation to 8 or 4 bits, as ZeRO++ describes it. Pure tensor functions.

[Note: packed form] A vector of ``numel`` elements becomes ``packed_nbytes(numel)`` bytes: first one bf16 scale a block,
then the codes. Scales lie first and the whole has an even number of bytes, so that rows of packed vectors, one after
another, can be viewed as bf16. In 4 bits the low halves of a block's bytes hold its first half, the high halves its
second: whole slices are packed, never every other element. The last block may be shorter.

[Note: why bf16 scales] They have the range of fp32 and cost two bytes, which buys blocks of half the size: for the wire's
bytes, finer blocks gain more than the 0.4 % that rounding a scale can lose. A scale rounded down makes no code overflow:
127 * (1 + 2**-8) and 7 * (1 + 2**-8) still round to 127 and 7.

[Note: what is not finite stays so] A block with an inf or NaN gets the scale NaN, and decodes to NaN whatever its codes are.
An overflow test that sums squares after the transfer therefore sees what it would have seen before it. Finite values stay
finite: a decoded value is at most the largest number of its dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

__all__ = ["INT4", "INT8", "BlockFormat"]

# Elements worked on at once on CPU, so that intermediate fp32 values (1 MB) stay in cache: whole vectors take half as
# long again, and much more memory.
_CHUNK_NUMEL = 1 << 18
# Below this scale (the smallest normal bf16) a block counts as zero: its reciprocal would overflow.
_SMALLEST_SCALE = torch.finfo(torch.bfloat16).tiny
_ROUNDING_OF_SCALE = 1.004


@dataclass(frozen=True)
class BlockFormat:
    """How vectors are packed: ``bits`` (8 or 4) a code, one scale for ``block_numel`` (even) consecutive elements.

    Every element decodes to within ``relative_error`` of its block's largest magnitude (or of 1.5e-36, which rounds to
    zero), plus the rounding of the output's dtype.
    """

    bits: int
    block_numel: int

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.block_numel < 2 or self.block_numel % 2:
            raise ValueError(
                f"a block format has 4 or 8 bits and blocks of an even number of elements, got bits={self.bits}, "
                f"block_numel={self.block_numel}"
            )

    @property
    def top(self) -> int:
        """The largest code; codes are -top..top."""
        return (1 << (self.bits - 1)) - 1

    @property
    def relative_error(self) -> float:
        """Bound of the error, in units of the block's largest magnitude: half a step."""
        return 0.5 * _ROUNDING_OF_SCALE / self.top

    def packed_nbytes(self, numel: int) -> int:
        """Bytes of a packed vector of ``numel`` elements; even."""
        return 2 * self._blocks(numel) + _even(self._code_nbytes(numel))

    def quantise(self, source: torch.Tensor, packed: torch.Tensor) -> None:
        """Packs each row of ``source`` (..., numel; floating) into one of ``packed`` (..., packed_nbytes; uint8).

        Rows must be contiguous; computed in fp32. ``packed`` must start at an even byte of its storage.

        Raises:
            ValueError: the two do not fit each other.
        """
        self._check(source, packed)
        numel = source.shape[-1]
        if not source.numel():
            return
        if self._code_nbytes(numel) % 2:
            packed[..., -1] = 0
        scales, codes = self._split(packed, numel)
        for values, block_scales, block_codes in self._parts(source, scales, codes):
            self._encode(values, block_scales, block_codes)

    def dequantise(self, packed: torch.Tensor, out: torch.Tensor, *, accumulate: bool = False) -> None:
        """Unpacks into ``out`` (..., numel; floating), or adds to it; the reverse of :meth:`quantise`."""
        self._check(out, packed)
        numel = out.shape[-1]
        if not out.numel():
            return
        scales, codes = self._split(packed, numel)
        largest = min(torch.finfo(out.dtype).max, torch.finfo(torch.float32).max)
        # A hair below, so that top * scale does not round up to infinity.
        steps = scales.float().clamp(max=largest * (1 - 2**-20) / self.top)
        for values, block_steps, block_codes in self._parts(out, steps, codes):
            self._decode(block_codes, block_steps.unsqueeze(-1), values, accumulate)

    # -- internals -----------------------------------------------------------------------------------------------------

    def _blocks(self, numel: int) -> int:
        return -(-numel // self.block_numel)

    def _code_nbytes(self, numel: int) -> int:
        return -(-numel * self.bits // 8)

    def _check(self, vector: torch.Tensor, packed: torch.Tensor) -> None:
        expected = (*vector.shape[:-1], self.packed_nbytes(vector.shape[-1]))
        if not vector.is_floating_point() or packed.dtype != torch.uint8 or tuple(packed.shape) != expected:
            raise ValueError(
                f"quantisation to {self.bits} bits packs a floating tensor of shape {tuple(vector.shape)} in uint8 of shape "
                f"{expected}, got {vector.dtype} and {packed.dtype} of shape {tuple(packed.shape)}"
            )

    def _split(self, packed: torch.Tensor, numel: int) -> tuple[torch.Tensor, torch.Tensor]:
        at = 2 * self._blocks(numel)
        return packed[..., :at].view(torch.bfloat16), packed[..., at : at + self._code_nbytes(numel)]

    def _parts(
        self, vector: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Blocks of equal width, a chunk at a time: (..., n, width), (..., n), (..., n, bytes of a block)."""
        numel, width, nbytes = vector.shape[-1], self.block_numel, self.block_numel * self.bits // 8
        count = numel // width
        step = count
        if vector.device.type == "cpu":
            step = max(1, _CHUNK_NUMEL // (width * (vector.numel() // numel)))
        if count:
            blocks = vector[..., : count * width].unflatten(-1, (count, width))
            block_codes = codes[..., : count * nbytes].unflatten(-1, (count, nbytes))
            for low in range(0, count, step):
                high = min(low + step, count)
                yield blocks[..., low:high, :], scales[..., low:high], block_codes[..., low:high, :]
        if numel % width:
            rest = vector[..., count * width :].unsqueeze(-2)
            yield rest, scales[..., count:], codes[..., count * nbytes :].unsqueeze(-2)

    def _encode(self, values: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor) -> None:
        # Reductions over short blocks of 16-bit values are slow on CPU (4 times), so these are widened first; two of
        # them need no copy of the values, as abs().amax() would.
        if values.dtype != torch.float32:
            values = values.float()
        peak = torch.maximum(values.amax(-1), -values.amin(-1))
        scales.copy_((peak / self.top).masked_fill_(~peak.isfinite(), torch.nan))
        rounded = scales.float()
        scales.masked_fill_(rounded < _SMALLEST_SCALE, 0)
        inverse = torch.where(rounded >= _SMALLEST_SCALE, rounded.reciprocal(), 0.0)
        scaled = torch.mul(values, inverse.unsqueeze(-1)).round_()
        if self.bits == 8:
            codes.view(torch.int8).copy_(scaled)
            return
        half = codes.shape[-1]
        first, second = scaled[..., :half], scaled[..., half:]
        if second.shape[-1] < half:
            second = torch.nn.functional.pad(second, (0, 1))
        # Both codes are raised by 8, to 1..15, so that a byte is a sum, which floats compute exactly.
        codes.copy_(torch.add(first, second, alpha=16).add_(8 * 17))

    def _decode(self, codes: torch.Tensor, steps: torch.Tensor, out: torch.Tensor, accumulate: bool) -> None:
        if self.bits == 8:
            codes = codes.view(torch.int8)
            if out.dtype == torch.float32 and not accumulate:
                out.copy_(codes).mul_(steps)
                return
            values = codes.float()
        else:
            half = codes.shape[-1]
            values = torch.empty((*codes.shape[:-1], 2 * half), dtype=torch.float32, device=codes.device)
            values[..., :half].copy_(codes & 15)
            values[..., half:].copy_(codes >> 4)
            values = values[..., : out.shape[-1]].sub_(8.0)
        values.mul_(steps)
        if accumulate:
            out.add_(values)
        else:
            out.copy_(values)


def _even(value: int) -> int:
    return value + value % 2


#: For weights: 0.2540 of fp32's bytes, 0.508 of bf16's.
INT8 = BlockFormat(bits=8, block_numel=128)
#: For gradients: 0.1407 of fp32's bytes.
INT4 = BlockFormat(bits=4, block_numel=32)
