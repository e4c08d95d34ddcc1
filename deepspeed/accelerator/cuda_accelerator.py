"""CUDA devices as accelerators (ROCm builds of torch present themselves the same way): thin calls of torch.cuda."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch

from .abstract_accelerator import DeepSpeedAccelerator, DeviceIndex

__all__ = ["CUDA_Accelerator"]


def _index(device_index: DeviceIndex) -> int | None:
    """Digits as an int; ``None`` stays, since torch reads it as "the current device"."""
    return None if device_index is None else int(device_index)


class CUDA_Accelerator(DeepSpeedAccelerator):
    """Making the object touches no device; its methods do."""

    _name = "cuda"
    _communication_backend_name = "nccl"

    def is_available(self) -> bool:
        return torch.cuda.is_available()

    def is_synchronized_device(self) -> bool:
        return False

    # -- devices -------------------------------------------------------------------------------------------------------
    def device_name(self, device_index: DeviceIndex = None) -> str:
        return self._name if device_index is None else f"{self._name}:{int(device_index)}"

    def device(self, device_index: DeviceIndex = None) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.current_device() if device_index is None else int(device_index))

    def set_device(self, device_index: DeviceIndex) -> None:
        if device_index is None:
            raise ValueError("set_device expects a device index, got None")
        torch.cuda.set_device(int(device_index))

    def current_device(self) -> int:
        return torch.cuda.current_device()

    def current_device_name(self) -> str:
        return self.device_name(self.current_device())

    def device_count(self) -> int:
        return torch.cuda.device_count()

    def synchronize(self, device_index: DeviceIndex = None) -> None:
        torch.cuda.synchronize(_index(device_index))

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.is_cuda

    # -- random numbers ------------------------------------------------------------------------------------------------
    def set_rng_state(self, new_state: torch.Tensor, device_index: DeviceIndex = None) -> None:
        torch.cuda.set_rng_state(new_state, self.device_name(device_index))

    def get_rng_state(self, device_index: DeviceIndex = None) -> torch.Tensor:
        return torch.cuda.get_rng_state(self.device_name(device_index))

    def manual_seed(self, seed: int) -> None:
        torch.cuda.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.cuda.manual_seed_all(seed)

    def initial_seed(self) -> int:
        return torch.cuda.initial_seed()

    def default_generator(self, device_index: DeviceIndex = None) -> torch.Generator:
        torch.cuda.init()  # the tuple of generators is empty until then
        return torch.cuda.default_generators[self.current_device() if device_index is None else int(device_index)]

    # -- streams and events --------------------------------------------------------------------------------------------
    @property
    def Stream(self) -> type[Any]:
        return torch.cuda.Stream

    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def current_stream(self, device_index: DeviceIndex = None) -> Any:
        return torch.cuda.current_stream(_index(device_index))

    def default_stream(self, device_index: DeviceIndex = None) -> Any:
        return torch.cuda.default_stream(_index(device_index))

    @property
    def Event(self) -> type[Any]:
        return torch.cuda.Event

    # -- memory --------------------------------------------------------------------------------------------------------
    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def memory_allocated(self, device_index: DeviceIndex = None) -> int:
        return torch.cuda.memory_allocated(_index(device_index))

    def max_memory_allocated(self, device_index: DeviceIndex = None) -> int:
        return torch.cuda.max_memory_allocated(_index(device_index))

    def memory_reserved(self, device_index: DeviceIndex = None) -> int:
        return torch.cuda.memory_reserved(_index(device_index))

    def max_memory_reserved(self, device_index: DeviceIndex = None) -> int:
        return torch.cuda.max_memory_reserved(_index(device_index))

    def reset_peak_memory_stats(self, device_index: DeviceIndex = None) -> None:
        torch.cuda.reset_peak_memory_stats(_index(device_index))

    def memory_stats(self, device_index: DeviceIndex = None) -> dict[str, Any]:
        return dict(torch.cuda.memory_stats(_index(device_index)))

    def total_memory(self, device_index: DeviceIndex = None) -> int:
        index = self.current_device() if device_index is None else int(device_index)
        return int(torch.cuda.get_device_properties(index).total_memory)

    def available_memory(self, device_index: DeviceIndex = None) -> int:
        """What the driver has free plus what torch's cache can hand out without it."""
        free, _ = torch.cuda.mem_get_info(_index(device_index))
        return int(free) + self.memory_reserved(device_index) - self.memory_allocated(device_index)

    # -- what it can compute -------------------------------------------------------------------------------------------
    def is_bf16_supported(self) -> bool:
        return self.is_available() and torch.cuda.is_bf16_supported()

    def is_fp16_supported(self) -> bool:
        return True

    def is_triton_supported(self) -> bool:
        # Triton's compiler targets compute capability 7.0 (Volta) and newer.
        return self.is_available() and torch.cuda.get_device_capability()[0] >= 7

    def amp(self) -> ModuleType:
        return torch.cuda.amp

    # -- host memory ---------------------------------------------------------------------------------------------------
    def pin_memory(self, tensor: torch.Tensor, align_bytes: int = 1) -> torch.Tensor:
        return tensor.pin_memory()

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.is_pinned()

    # -- profiling and start-up ----------------------------------------------------------------------------------------
    def range_push(self, msg: str) -> None:
        torch.cuda.nvtx.range_push(msg)

    def range_pop(self) -> None:
        torch.cuda.nvtx.range_pop()

    def lazy_call(self, callback: Callable[[], Any]) -> None:
        if torch.cuda.is_initialized():
            callback()
        else:
            torch.cuda._lazy_call(callback)  # type: ignore[no-untyped-call]  # queued until the first device use

    def visible_devices_envs(self) -> list[str]:
        return ["CUDA_VISIBLE_DEVICES"]
