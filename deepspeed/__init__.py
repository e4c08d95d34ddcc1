"""Train, fine-tune and serve models that do not fit one device.

The public surface of the package. Submodules, and torch itself, are imported when first used.
Source: chapters 1 and 2 of the DeepSpeed 0.14.1 API documentation.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from deepspeed._core.lazy import attach, no_collection
from deepspeed.version import __version__

if TYPE_CHECKING:
    import torch

    from deepspeed.runtime.engine import DeepSpeedEngine

__all__ = ["DeepSpeedEngine", "__version__", "add_config_arguments", "init_distributed", "initialize"]

__getattr__, __dir__ = attach(
    __name__,
    ("accelerator", "checkpoint", "comm", "launcher", "ops", "runtime", "utils", "errors", "env_report"),
    {
        "zero": "deepspeed.runtime.zero",
        "checkpointing": "deepspeed.runtime.activation_checkpointing.checkpointing",
        "DeepSpeedEngine": "deepspeed.runtime.engine:DeepSpeedEngine",
        "DeepSpeedConfig": "deepspeed.runtime.config:DeepSpeedConfig",
        "DeepSpeedConfigError": "deepspeed.errors:ConfigError",
        "DeepSpeedOptimizer": "deepspeed.runtime.base_optimizer:DeepSpeedOptimizer",
        "ZeROOptimizer": "deepspeed.runtime.base_optimizer:DeepSpeedOptimizer",
        "add_tuning_arguments": "deepspeed.runtime.lr_schedules:add_tuning_arguments",
        "dist": "deepspeed.comm",
        "get_accelerator": "deepspeed.accelerator:get_accelerator",
        "init_distributed": "deepspeed.comm:init_distributed",
        "log_dist": "deepspeed.utils.logging:log_dist",
        "logger": "deepspeed.utils.logging:logger",
    },
    absent={
        "OnDevice": 'build the model under `with torch.device("meta")` instead',
        "init_inference": "its inference engine is not in this version; ZeRO-3 without an optimizer runs large models",
        "tp_model_init": "tensor parallelism is not in this version; unset autotp_size (tensor_parallel.autotp_size)",
    },
)


def initialize(
    args: Any = None,
    model: torch.nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: torch.utils.data.Dataset[Any] | None = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: str | dict[str, Any] | None = None,
    mesh_param: Any = None,
    config_params: str | dict[str, Any] | None = None,
) -> tuple[DeepSpeedEngine, Any, Any, Any]:
    """Wraps a model for training. Collective: every rank calls it, with the same config.

    Args:
        args: an object with ``deepspeed_config`` (a path) and ``local_rank``; not needed if ``config`` is given.
        model: the module, before any wrapper.
        optimizer: a torch optimizer, or a callable that makes one from parameters; overrides the config's.
        model_parameters: tensors or group dicts to train, consumed once; default: all that require gradients.
        training_data: a map-style or iterable dataset, given back as a loader of micro-batches.
        lr_scheduler: a scheduler with ``step``, or a callable that makes one from the (inner) optimizer.
        distributed_port: rendezvous port, used only if this call has to set up torch.distributed.
        mpu: gives ``get_data_parallel_group()`` and relatives, if a part of the world shares gradients.
        dist_init_required: None sets up torch.distributed if needed; True and False force it.
        collate_fn: merges samples to a micro-batch, for ``training_data``.
        config: a dict, the path of a JSON file, or base64 text of one. ``config_params`` is its old name.
        mesh_param: not supported yet.

    Returns:
        ``(engine, optimizer, training_dataloader, lr_scheduler)``; what does not exist is None. The optimizer is the
        wrapped one (ZeRO, 16 bit) or, in plain fp32 without ZeRO, the torch optimizer itself.
    """
    # Heavy parts load on first use, which keeps `import deepspeed` cheap for programs that merely have it installed.
    with no_collection():
        from deepspeed import comm  # noqa: PLC0415
        from deepspeed.errors import ConfigError, MissingFeatureError  # noqa: PLC0415
        from deepspeed.runtime.engine import DeepSpeedEngine  # noqa: PLC0415

    if model is None:
        raise ConfigError("deepspeed.initialize: model is required")
    if mesh_param is not None:
        raise MissingFeatureError("deepspeed.initialize: mesh_param is not supported yet; leave it out")
    chosen = _choose_config(args, config, config_params)
    comm.init_distributed(distributed_port=distributed_port, dist_init_required=dist_init_required, verbose=False)
    with no_collection():
        engine = DeepSpeedEngine(
            model,
            chosen,
            args=args,
            optimizer=optimizer,
            model_parameters=model_parameters,
            training_data=training_data,
            lr_scheduler=lr_scheduler,
            mpu=mpu,
            collate_fn=collate_fn,
        )
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _choose_config(args: Any, config: Any, config_params: Any) -> Any:
    from deepspeed.errors import ConfigError  # noqa: PLC0415 (see initialize)

    from_args = getattr(args, "deepspeed_config", None) or getattr(args, "deepscale_config", None)
    given = [
        (name, value)
        for name, value in (("config", config), ("config_params", config_params), ("args.deepspeed_config", from_args))
        if value is not None
    ]
    if not given:
        raise ConfigError(
            "deepspeed.initialize: no config. Pass config= (a dict or the path of a JSON file), or an args object whose "
            "deepspeed_config names a file (--deepspeed_config on the command line)"
        )
    if len(given) > 1 and any(value is not given[0][1] and value != given[0][1] for _, value in given[1:]):
        raise ConfigError(
            f"deepspeed.initialize: {' and '.join(name for name, _ in given)} are all given and differ; pass one of them"
        )
    return given[0][1]


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds ``--deepspeed`` and ``--deepspeed_config <json file>`` (and their deprecated twins) to a parser."""
    group = parser.add_argument_group("DeepSpeed", "DeepSpeed configuration")
    group.add_argument("--deepspeed", default=False, action="store_true", help="use DeepSpeed (a flag for your script)")
    group.add_argument("--deepspeed_config", default=None, type=str, help="path of the DeepSpeed JSON config")
    group.add_argument("--deepscale", default=False, action="store_true", help=argparse.SUPPRESS)
    group.add_argument("--deepscale_config", default=None, type=str, help=argparse.SUPPRESS)
    return parser
