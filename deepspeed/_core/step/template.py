"""What an optimizer keeps for a tensor, found by stepping a scrap one: torch's optimizers do not tell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["state_template"]


def state_template(
    optimizer: torch.optim.Optimizer, options: Mapping[str, Any], scrap: torch.Tensor
) -> dict[str, Any] | None:
    """What a step with the group ``options`` puts into the state of a tensor such as ``scrap``, which is used up.

    None where that does not work (a client's optimizer may need what only its constructor sets), or where a state is not
    element-wise. Neither the optimizer nor its state is changed.
    """
    param = torch.nn.Parameter(scrap)
    param.grad = torch.zeros_like(param)
    try:
        probe = type(optimizer).__new__(type(optimizer))
        group = {**options, "params": [param]}
        probe.__setstate__({**optimizer.__getstate__(), "state": defaultdict(dict), "param_groups": [group]})
        probe.step()
        state = dict(probe.state.get(param, {}))
    except Exception:  # whatever a foreign class raises
        return None
    shapes = {tuple(v.shape) for v in state.values() if isinstance(v, torch.Tensor) and v.dim()}
    return state if shapes <= {tuple(param.shape)} else None
