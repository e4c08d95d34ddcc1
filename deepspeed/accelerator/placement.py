"""Which of the devices that a process sees is its own."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ..errors import ConfigError
from .abstract_accelerator import DeepSpeedAccelerator
from .real_accelerator import get_accelerator

__all__ = ["own_device_index"]

#: What limits the devices that a process sees, as launchers and drivers name it.
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")


def own_device_index(
    local_rank: int,
    accelerator: DeepSpeedAccelerator | None = None,
    environment: Mapping[str, str] | None = None,
) -> int:
    """The index of the device of rank ``local_rank`` of this host. Not collective; touches no device.

    All ranks of a host may see all of its devices, and then take the one with their number. Or each is shown one of its
    own (``srun --gpus-per-task=1``), which is number 0 to it.

    Raises:
        ConfigError: there is no device with that number.
    """
    accelerator = get_accelerator() if accelerator is None else accelerator
    environment = os.environ if environment is None else environment
    count = accelerator.device_count()
    if local_rank < count:
        return local_rank
    if count == 1 and any(environment.get(name) for name in _VISIBLE):
        return 0
    raise ConfigError(
        f"LOCAL_RANK={local_rank}, but this process sees {count} {accelerator.device_name()} device(s): start no more "
        "ranks per host than devices; show all of them to every rank, or to each rank one of its own "
        "(CUDA_VISIBLE_DEVICES)"
    )
