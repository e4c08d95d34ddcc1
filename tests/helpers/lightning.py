"""Lightning's DeepSpeed strategies on the CPU.

They insist on an accelerator that is a ``CUDAAccelerator``. Lightning lets programs bring accelerators of their own, and
so these are ones, whose devices happen to be ``cpu:0``, ``cpu:1``, ...; the strategies themselves are the released ones.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.accelerators import CUDAAccelerator as FabricCUDA
from lightning.pytorch.accelerators import CUDAAccelerator as TrainerCUDA


class _OnCPU:
    def setup_device(self, device: torch.device) -> None:
        if device.type != "cpu":
            raise ValueError(f"expected a CPU device, got {device}")

    def setup(self, trainer: Any) -> None: ...

    def teardown(self) -> None: ...

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return list(range(int(devices)))

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        return [torch.device("cpu", index) for index in devices]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True


class FabricOnCPU(_OnCPU, FabricCUDA): ...


class TrainerOnCPU(_OnCPU, TrainerCUDA): ...
