"""The CPU as an accelerator: one device, host memory, work that is done when a call returns."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch

from .abstract_accelerator import DeepSpeedAccelerator, DeviceIndex

__all__ = ["CPU_Accelerator"]


class _HostStream:
    """Stands for "the order of the program": everything queued on it is already done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs  # device and priority of a real stream

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: _HostEvent | None = None) -> _HostEvent:
        event = _HostEvent() if event is None else event
        event.record(self)
        return event


class _HostEvent:
    """A moment on the host's clock; all work before it is done."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        del blocking, interprocess
        self._enable_timing = enable_timing
        self._at_s: float | None = None

    def record(self, stream: Any = None) -> None:
        self._at_s = time.perf_counter()

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end_event: _HostEvent) -> float:
        """Milliseconds from this event to ``end_event``; both must time and be recorded, as on a device."""
        if not (self._enable_timing and end_event._enable_timing):
            raise ValueError("elapsed_time needs two events made with enable_timing=True")
        if self._at_s is None or end_event._at_s is None:
            raise ValueError("elapsed_time needs two events that were recorded")
        return (end_event._at_s - self._at_s) * 1e3


def _psutil() -> Any:
    import psutil  # noqa: PLC0415 (36 ms, and asked for by reports only)

    return psutil


class CPU_Accelerator(DeepSpeedAccelerator):
    """Memory numbers are those of this process: resident bytes now and, on Linux, their true peak."""

    _name = "cpu"
    _communication_backend_name = "gloo"

    def is_available(self) -> bool:
        return True

    def is_synchronized_device(self) -> bool:
        return True

    # -- devices -------------------------------------------------------------------------------------------------------
    def device_name(self, device_index: DeviceIndex = None) -> str:
        return self._name

    def device(self, device_index: DeviceIndex = None) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def set_device(self, device_index: DeviceIndex) -> None:
        """There is one device, so every index chooses it: ranks on one host all pass their ``LOCAL_RANK``."""

    def current_device(self) -> int:
        return 0

    def current_device_name(self) -> str:
        return self._name

    def device_count(self) -> int:
        return 1

    def synchronize(self, device_index: DeviceIndex = None) -> None: ...

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == self._name

    # -- random numbers ------------------------------------------------------------------------------------------------
    def set_rng_state(self, new_state: torch.Tensor, device_index: DeviceIndex = None) -> None:
        torch.set_rng_state(new_state)

    def get_rng_state(self, device_index: DeviceIndex = None) -> torch.Tensor:
        return torch.get_rng_state()

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def initial_seed(self) -> int:
        return torch.initial_seed()

    def default_generator(self, device_index: DeviceIndex = None) -> torch.Generator:
        return torch.default_generator

    # -- streams and events --------------------------------------------------------------------------------------------
    @property
    def Stream(self) -> type[Any]:
        return _HostStream

    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        return contextlib.nullcontext(stream)

    def current_stream(self, device_index: DeviceIndex = None) -> Any:
        return _HOST_STREAM

    def default_stream(self, device_index: DeviceIndex = None) -> Any:
        return _HOST_STREAM

    @property
    def Event(self) -> type[Any]:
        return _HostEvent

    # -- memory --------------------------------------------------------------------------------------------------------
    def empty_cache(self) -> None: ...

    def memory_allocated(self, device_index: DeviceIndex = None) -> int:
        return int(_psutil().Process().memory_info().rss)

    def max_memory_allocated(self, device_index: DeviceIndex = None) -> int:
        """Peak resident bytes as the kernel counts them; where it does not say (not Linux), the bytes of now."""
        try:
            with open("/proc/self/status", encoding="ascii", errors="replace") as status:
                for line in status:
                    if line.startswith("VmHWM:"):
                        return int(line.split()[1]) * 1024
        except OSError:
            pass
        return self.memory_allocated()

    def memory_reserved(self, device_index: DeviceIndex = None) -> int:
        return self.memory_allocated()

    def max_memory_reserved(self, device_index: DeviceIndex = None) -> int:
        return self.max_memory_allocated()

    def reset_peak_memory_stats(self, device_index: DeviceIndex = None) -> None:
        # proc(5): writing 5 resets the peak of the resident set. Elsewhere no peak is kept, so there is none to reset.
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as control:
            control.write("5")

    def memory_stats(self, device_index: DeviceIndex = None) -> dict[str, Any]:
        """``psutil``'s numbers of this process (``rss``, ``vms``, ``shared``, ...) and ``peak_rss``, in bytes."""
        return {**_psutil().Process().memory_info()._asdict(), "peak_rss": self.max_memory_allocated()}

    def total_memory(self, device_index: DeviceIndex = None) -> int:
        return int(_psutil().virtual_memory().total)

    def available_memory(self, device_index: DeviceIndex = None) -> int:
        return int(_psutil().virtual_memory().available)

    # -- what it can compute -------------------------------------------------------------------------------------------
    def is_bf16_supported(self) -> bool:
        return True

    def is_fp16_supported(self) -> bool:
        return True

    def is_triton_supported(self) -> bool:
        return False

    def amp(self) -> ModuleType:
        return torch.cpu.amp

    # -- host memory ---------------------------------------------------------------------------------------------------
    def pin_memory(self, tensor: torch.Tensor, align_bytes: int = 1) -> torch.Tensor:
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.is_pinned()

    # -- profiling and start-up ----------------------------------------------------------------------------------------
    def range_push(self, msg: str) -> None: ...

    def range_pop(self) -> None: ...

    def lazy_call(self, callback: Callable[[], Any]) -> None:
        callback()

    def visible_devices_envs(self) -> list[str]:
        return []


_HOST_STREAM = _HostStream()
