"""What an accelerator must offer (names: DeepSpeed's published accelerator abstraction guide).

Sizes of memory are bytes, times of events milliseconds, device indices those of this process. No method is collective.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch

__all__ = ["DeepSpeedAccelerator"]

DeviceIndex = int | str | None


class DeepSpeedAccelerator(abc.ABC):
    """One kind of device. Objects hold no device state of their own, so any number of them may exist."""

    #: Type of device in torch's words, e.g. ``"cuda"``.
    _name: str
    #: Backend of torch.distributed for tensors on this device.
    _communication_backend_name: str

    # -- kind ----------------------------------------------------------------------------------------------------------
    @abc.abstractmethod
    def is_available(self) -> bool:
        """Whether at least one such device can be used by this process."""

    @abc.abstractmethod
    def is_synchronized_device(self) -> bool:
        """Whether every operation has finished when its call returns, so that streams and events mean nothing."""

    def use_host_timers(self) -> bool:
        """Whether the host's clock measures device work without a synchronization."""
        return self.is_synchronized_device()

    def resolves_data_dependency(self) -> bool:
        """Whether operations on different streams are ordered without events."""
        return self.is_synchronized_device()

    def handles_memory_backpressure(self) -> bool:
        """Whether the host is stopped before it can queue more work than the memory holds."""
        return self.is_synchronized_device()

    def communication_backend_name(self) -> str:
        """``"gloo"``, ``"nccl"``, ..."""
        return self._communication_backend_name

    # -- devices -------------------------------------------------------------------------------------------------------
    @abc.abstractmethod
    def device_name(self, device_index: DeviceIndex = None) -> str:
        """Device string for torch: ``device_name()`` is the type ("cuda"), ``device_name(1)`` that device ("cuda:1").

        An index given as digits (as read from ``LOCAL_RANK``) is taken too. On CPU every answer is ``"cpu"``.
        """

    @abc.abstractmethod
    def device(self, device_index: DeviceIndex = None) -> AbstractContextManager[Any]:
        """Context in which ``device_index`` is the current device."""

    @abc.abstractmethod
    def set_device(self, device_index: DeviceIndex) -> None:
        """Makes the device current for this thread."""

    @abc.abstractmethod
    def current_device(self) -> int:
        """Index of the current device. To place a tensor use :meth:`current_device_name`, which also names the type."""

    @abc.abstractmethod
    def current_device_name(self) -> str:
        """String of the current device, e.g. ``"cuda:0"`` or ``"cpu"``."""

    @abc.abstractmethod
    def device_count(self) -> int:
        """Number of devices that this process sees."""

    @abc.abstractmethod
    def synchronize(self, device_index: DeviceIndex = None) -> None:
        """Waits until the work queued on the device is done."""

    @abc.abstractmethod
    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor lies on a device of this kind."""

    # -- random numbers ------------------------------------------------------------------------------------------------
    def random(self) -> ModuleType:
        """torch's module of random number functions."""
        return torch.random

    @abc.abstractmethod
    def set_rng_state(self, new_state: torch.Tensor, device_index: DeviceIndex = None) -> None:
        """Sets the device's generator to a state that :meth:`get_rng_state` returned (1D uint8 on the host)."""

    @abc.abstractmethod
    def get_rng_state(self, device_index: DeviceIndex = None) -> torch.Tensor:
        """State of the device's generator, 1D uint8 on the host."""

    @abc.abstractmethod
    def manual_seed(self, seed: int) -> None:
        """Seeds the generator of the current device."""

    @abc.abstractmethod
    def manual_seed_all(self, seed: int) -> None:
        """Seeds the generators of all devices."""

    @abc.abstractmethod
    def initial_seed(self) -> int:
        """Seed that the current device's generator started from."""

    @abc.abstractmethod
    def default_generator(self, device_index: DeviceIndex = None) -> torch.Generator:
        """torch's default generator of the device."""

    # -- streams and events --------------------------------------------------------------------------------------------
    @property
    @abc.abstractmethod
    def Stream(self) -> type[Any]:
        """Class of streams: ``get_accelerator().Stream()`` makes one."""

    @abc.abstractmethod
    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        """Context in which work is queued on ``stream``; ``None`` changes nothing."""

    @abc.abstractmethod
    def current_stream(self, device_index: DeviceIndex = None) -> Any:
        """The stream that work goes to now."""

    @abc.abstractmethod
    def default_stream(self, device_index: DeviceIndex = None) -> Any:
        """The device's default stream."""

    @property
    @abc.abstractmethod
    def Event(self) -> type[Any]:
        """Class of events, with ``record``, ``wait``, ``query``, ``synchronize`` and ``elapsed_time`` (ms)."""

    # -- memory --------------------------------------------------------------------------------------------------------
    @abc.abstractmethod
    def empty_cache(self) -> None:
        """Gives memory that is cached but not in use back to the system."""

    @abc.abstractmethod
    def memory_allocated(self, device_index: DeviceIndex = None) -> int:
        """Bytes in use by this process."""

    @abc.abstractmethod
    def max_memory_allocated(self, device_index: DeviceIndex = None) -> int:
        """Highest :meth:`memory_allocated` since the start or the last :meth:`reset_peak_memory_stats`."""

    @abc.abstractmethod
    def memory_reserved(self, device_index: DeviceIndex = None) -> int:
        """Bytes in use or cached by this process."""

    @abc.abstractmethod
    def max_memory_reserved(self, device_index: DeviceIndex = None) -> int:
        """Highest :meth:`memory_reserved` since the start or the last :meth:`reset_peak_memory_stats`."""

    @abc.abstractmethod
    def reset_peak_memory_stats(self, device_index: DeviceIndex = None) -> None:
        """Starts both peaks afresh from what is in use now."""

    @abc.abstractmethod
    def memory_stats(self, device_index: DeviceIndex = None) -> dict[str, Any]:
        """All that the allocator knows, under its own keys."""

    @abc.abstractmethod
    def total_memory(self, device_index: DeviceIndex = None) -> int:
        """Bytes that the device has."""

    @abc.abstractmethod
    def available_memory(self, device_index: DeviceIndex = None) -> int:
        """Bytes that can still be had on the device."""

    def memory_cached(self, device_index: DeviceIndex = None) -> int:
        """Older name of :meth:`memory_reserved`."""
        return self.memory_reserved(device_index)

    def max_memory_cached(self, device_index: DeviceIndex = None) -> int:
        """Older name of :meth:`max_memory_reserved`."""
        return self.max_memory_reserved(device_index)

    def reset_max_memory_allocated(self, device_index: DeviceIndex = None) -> None:
        """Older name of :meth:`reset_peak_memory_stats`."""
        self.reset_peak_memory_stats(device_index)

    def reset_max_memory_cached(self, device_index: DeviceIndex = None) -> None:
        """Older name of :meth:`reset_peak_memory_stats`."""
        self.reset_peak_memory_stats(device_index)

    # -- what it can compute -------------------------------------------------------------------------------------------
    @abc.abstractmethod
    def is_bf16_supported(self) -> bool:
        """Whether models train in bfloat16 here."""

    @abc.abstractmethod
    def is_fp16_supported(self) -> bool:
        """Whether models train in float16 here."""

    @abc.abstractmethod
    def is_triton_supported(self) -> bool:
        """Whether Triton kernels run on the device. Does not say that the ``triton`` package is installed."""

    def supported_dtypes(self) -> list[torch.dtype]:
        """Floating dtypes that models train in, float32 first."""
        dtypes = [torch.float32]
        if self.is_fp16_supported():
            dtypes.append(torch.float16)
        if self.is_bf16_supported():
            dtypes.append(torch.bfloat16)
        return dtypes

    @abc.abstractmethod
    def amp(self) -> ModuleType:
        """torch's module of automatic mixed precision for the device."""

    # -- host memory ---------------------------------------------------------------------------------------------------
    @abc.abstractmethod
    def pin_memory(self, tensor: torch.Tensor, align_bytes: int = 1) -> torch.Tensor:
        """Copy of a host tensor in page-locked memory; the tensor itself where host memory is device memory.

        ``align_bytes`` is a wish of file engines; torch's host allocator aligns to at least 64 bytes.
        """

    @abc.abstractmethod
    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor lies in page-locked memory."""

    # -- profiling and start-up ----------------------------------------------------------------------------------------
    @abc.abstractmethod
    def range_push(self, msg: str) -> None:
        """Opens a named range in the device's profiler."""

    @abc.abstractmethod
    def range_pop(self) -> None:
        """Closes the range opened last."""

    @abc.abstractmethod
    def lazy_call(self, callback: Callable[[], Any]) -> None:
        """Calls ``callback`` now if the device is initialized, else when it is."""

    @abc.abstractmethod
    def visible_devices_envs(self) -> list[str]:
        """Names of the environment variables that choose the devices which a new process sees."""

    def set_visible_devices_envs(self, current_env: dict[str, str], local_accelerator_ids: list[int]) -> None:
        """Writes the device choice for a new process into its environment."""
        for name in self.visible_devices_envs():
            current_env[name] = ",".join(map(str, local_accelerator_ids))
