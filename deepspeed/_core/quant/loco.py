"""LoCo: what quantisation lost of a vector in earlier steps is added to it before it is quantised again.

Sent values then average out to the true ones: with the residual ``r`` (what was to be sent less what was) and the average
``e = err_beta * e + (1 - err_beta) * r``, the sum of all that was sent differs from the sum of all vectors by
``e / (1 - err_beta)``, however many steps there were. The average, not the last residual, is added because a residual
of a noisy gradient is mostly noise. It is kept in 8 bits, about a byte an element, since it is as large as the gradients
that are sent (all of the model's, on each rank).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from deepspeed._core.quant.blocks import INT8, BlockFormat

__all__ = ["ErrorFeedback"]


@dataclass
class _Memory:
    shape: torch.Size
    packed: torch.Tensor  # uint8, the average in the form of INT8
    uses: int = 0


class ErrorFeedback:
    """The error averages of the vectors that one sender quantises, each under a key (``zeropp_loco_param``).

    Args:
        err_beta: weight of the past in the average, 0..1: 0 adds back the whole last error; 1 never learns one.
        reset_T: a vector's average is cleared after so many uses, one use a reduction.
    """

    def __init__(self, *, err_beta: float = 0.8, reset_T: int = 1024) -> None:
        if not 0 <= err_beta <= 1 or reset_T < 1:
            raise ValueError(
                f"zeropp_loco_param: err_beta is between 0 and 1 and reset_T at least 1, got err_beta={err_beta}, "
                f"reset_T={reset_T}"
            )
        self.err_beta = err_beta
        self.reset_T = reset_T
        self._memories: dict[Hashable, _Memory] = {}

    def quantise(self, key: Hashable, form: BlockFormat, source: torch.Tensor, packed: torch.Tensor) -> None:
        """:meth:`BlockFormat.quantise` of ``source`` plus the average error kept under ``key``, which is then updated.

        A key stands for the same elements in every call; another shape than last time starts anew. Blocks with an
        inf or NaN reach the receiver as such and leave no trace in the average.
        """
        memory = self._memory(key, source)
        average = torch.empty(source.shape, dtype=torch.float32, device=source.device)
        INT8.dequantise(memory.packed, average)
        wanted = source + average
        form.quantise(wanted, packed)
        sent = torch.empty_like(wanted)
        form.dequantise(packed, sent)
        residual = wanted.sub_(sent).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        INT8.quantise(average.lerp_(residual, 1 - self.err_beta), memory.packed)
        memory.uses += 1
        if memory.uses >= self.reset_T:
            del self._memories[key]

    def clear(self) -> None:
        """Forgets all averages: after a change of the loss scale, which they are multiplied by, or of the layout."""
        self._memories.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the averages take."""
        return sum(memory.packed.numel() for memory in self._memories.values())

    def _memory(self, key: Hashable, source: torch.Tensor) -> _Memory:
        memory = self._memories.get(key)
        if memory is None or memory.shape != source.shape or memory.packed.device != source.device:
            shape = (*source.shape[:-1], INT8.packed_nbytes(source.shape[-1]))
            memory = _Memory(source.shape, torch.zeros(shape, dtype=torch.uint8, device=source.device))
            self._memories[key] = memory
        return memory
