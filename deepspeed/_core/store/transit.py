"""Gradients on their way from an accelerator to a tile on the host, and weights on their way back."""

from __future__ import annotations

from collections import deque

import torch

from deepspeed._core.aio import aligned_empty
from deepspeed.utils.logging import warning_once

__all__ = ["Transit"]

_BUFFERS = 2  # one is filled while the other is still being copied


class Transit:
    """Host buffers of exact size between device and host; none where both are the same memory.

    Args:
        device: where gradients and weights are.
        numel: elements of the largest tile.
        pin: page-lock the buffers, so that copies run beside the update. Where that fails, they are pageable.
    """

    def __init__(self, device: torch.device, numel: int, pin: bool) -> None:
        self._device, self._numel, self._pin = device, numel, pin and device.type == "cuda"
        self._made: list[torch.Tensor] = []
        self._free: deque[torch.Tensor] = deque()
        self._going: deque[tuple[torch.Tensor, torch.Event]] = deque()

    def nbytes(self, weight_dtype: torch.dtype) -> int:
        """Host memory that the buffers will take."""
        return 0 if self._device.type == "cpu" else _BUFFERS * self._numel * weight_dtype.itemsize

    def to_host(self, grad: torch.Tensor) -> torch.Tensor:
        """The gradient on the host."""
        return grad if grad.device.type == "cpu" else grad.to("cpu")

    def room(self, weights: torch.Tensor) -> torch.Tensor:
        """Where a kernel writes new weights: the weights themselves, or a buffer for :meth:`send`."""
        if weights.device.type == "cpu":
            return weights
        while len(self._made) >= _BUFFERS and not self._free:
            buffer, event = self._going.popleft()
            event.synchronize()
            self._free.append(buffer)
        nbytes = weights.numel() * weights.element_size()
        if not self._free:
            self._made.append(self._lock(aligned_empty(self._numel * weights.element_size())))
            self._free.append(self._made[-1])
        buffer = self._free.popleft()
        if buffer.numel() < nbytes:  # another dtype
            self._made = [known for known in self._made if known is not buffer]
            buffer = self._lock(aligned_empty(self._numel * weights.element_size()))
            self._made.append(buffer)
        return buffer[:nbytes].view(weights.dtype)

    def send(self, room: torch.Tensor, weights: torch.Tensor) -> None:
        """Starts the copy of what was written into ``room``; later work on the device's stream sees it."""
        if weights.device.type == "cpu":
            return
        weights.copy_(room, non_blocking=self._pin)
        event = torch.Event(device=weights.device)
        event.record()
        whole = next(known for known in self._made if known.data_ptr() == room.data_ptr())
        self._going.append((whole, event))

    def _lock(self, buffer: torch.Tensor) -> torch.Tensor:
        if self._pin:
            code = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0)
            if int(code) != 0:
                self._pin = False
                warning_once(
                    f"{buffer.numel()} bytes of host memory could not be page-locked (error {int(code)}): offload goes on "
                    "with pageable memory, and slower copies"
                )
        return buffer
