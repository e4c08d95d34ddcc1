"""Common base of the optimizers that ``deepspeed.initialize`` returns around a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["DeepSpeedOptimizer"]


class DeepSpeedOptimizer:
    """Wraps a torch optimizer, reachable as ``.optimizer``; ``param_groups`` are its own, live dict objects.

    Not a ``torch.optim.Optimizer``: its groups hold fp32 shards, not the model's parameters. Clients subclass it and
    call its methods with a proxy as ``self``, so that methods here read attributes but set none.
    """

    optimizer: torch.optim.Optimizer
    overflow: bool = False
    """Whether the last ``step`` was skipped for non-finite gradients."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    def add_param_group(self, group: dict[str, Any]) -> None:
        raise RuntimeError(
            "parameter groups cannot be added after deepspeed.initialize, which laid out the shards: give all groups "
            "to the optimizer first, or initialize again"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        raise NotImplementedError

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any], **kwargs: Any) -> None:
        raise NotImplementedError
