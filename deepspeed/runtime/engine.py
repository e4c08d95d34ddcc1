"""The training engine: forward, backward and step of a wrapped model, phases only.

What each phase needs is built once by :mod:`deepspeed.runtime.engine_setup`; gradients, shards and precision live in
the optimizer (:mod:`deepspeed.runtime.flat_optimizer`), files in :mod:`deepspeed.runtime.engine_saving` and
:mod:`deepspeed.runtime.engine_loading`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Container, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from deepspeed import comm as dist
from deepspeed._core.lazy import load_now, on_first_use
from deepspeed.comm import doctor
from deepspeed.comm.agreement import together
from deepspeed.errors import ConfigError
from deepspeed.runtime.config_getters import ConfigGetters
from deepspeed.runtime.utils import map_tensors
from deepspeed.utils.logging import log_dist, warning_once
from deepspeed.version import __version__

if TYPE_CHECKING:
    from deepspeed._core.ckpt import guard, save
    from deepspeed.runtime import config as configuration
    from deepspeed.runtime import (
        dataloader,
        engine_loading,
        engine_saving,
        engine_setup,
        export,
        flat_optimizer,
        optimizer_offload,
        progress,
    )
    from deepspeed.runtime.zero import offload_states
    from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum
else:
    # Programs that do not train with us import this class to unwrap models (Accelerate does), so that its parts come later.
    configuration = on_first_use("deepspeed.runtime.config")
    dataloader = on_first_use("deepspeed.runtime.dataloader")
    engine_loading = on_first_use("deepspeed.runtime.engine_loading")
    engine_saving = on_first_use("deepspeed.runtime.engine_saving")
    engine_setup = on_first_use("deepspeed.runtime.engine_setup")
    export = on_first_use("deepspeed.runtime.export")
    flat_optimizer = on_first_use("deepspeed.runtime.flat_optimizer")
    guard = on_first_use("deepspeed._core.ckpt.guard")
    offload_states = on_first_use("deepspeed.runtime.zero.offload_states")
    optimizer_offload = on_first_use("deepspeed.runtime.optimizer_offload")
    progress = on_first_use("deepspeed.runtime.progress")
    save = on_first_use("deepspeed._core.ckpt.save")

__all__ = ["DeepSpeedEngine"]


class DeepSpeedEngine(torch.nn.Module, ConfigGetters):
    """Wraps a module for distributed training; made by :func:`deepspeed.initialize`, whose arguments it takes.

    Unknown attributes resolve on the wrapped module. Construction is collective.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: str | dict[str, Any],
        *,
        args: Any = None,
        optimizer: engine_setup.OptimizerLike = None,
        model_parameters: Iterable[Any] | None = None,
        training_data: Any = None,
        lr_scheduler: Any = None,
        mpu: Any = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, torch.nn.Module):
            raise ConfigError(f"deepspeed.initialize: model must be a torch.nn.Module, not {type(model).__name__}")
        self.config = config
        self.mpu = mpu
        self.device = engine_setup.choose_device(args)
        self.dp_process_group = engine_setup.data_parallel_group(mpu)

        def plan() -> tuple[configuration.DeepSpeedConfig, torch.optim.Optimizer | None, Any]:
            parsed = configuration.DeepSpeedConfig(config)
            parsed.resolve_batch(self.dp_world_size)
            made = engine_setup.make_inner_optimizer(parsed, optimizer, model_parameters, model)
            return parsed, made, engine_setup.make_scheduler(parsed, lr_scheduler, made)

        # Everything that can be wrong with the arguments comes before anything is changed.
        self._config, inner, self.lr_scheduler = together(plan, ConfigError)
        log_dist(f"DeepSpeed info: version={__version__}, world size={dist.get_world_size()}, device={self.device}")

        self.module = model
        self.collate_fn = collate_fn
        self.micro_steps = self.global_steps = self.global_samples = self.skipped_steps = 0
        self.loaded_checkpoint_tag: str | None = None
        self._boundary: bool | None = None
        self._accumulate_only = False
        self._step_applied = False
        self._precision = engine_setup.precision_policy(self._config, model)
        self._progress = progress.Progress(self._config)

        trained = {p for g in inner.param_groups for p in g["params"] if p.requires_grad} if inner else set()
        self._offload = engine_setup.partition_or_unite(
            self._config, model, self._precision, self.device, self.dp_process_group, trained
        )
        engine_setup.prepare_module(model, self._precision, self.device, self.dp_process_group, trained)
        self._flat: flat_optimizer.FlatOptimizer | None = None
        if inner is not None:
            self._flat = engine_setup.make_flat_optimizer(
                self._config,
                inner,
                model,
                self._precision,
                device=self.device,
                group=self.dp_process_group,
                reduce_now=self._reduces_now,
                offload=self._offload,
            )
            shards = self._offload.planned_nbytes() if self._offload is not None else None
            optimizer_offload.announce(self._flat, optimizer_offload.MemoryPlan(**shards) if shards else None)
        if self._offload is not None:
            self._offload.attach()
        # A plain fp32 run without ZeRO gives the user's own optimizer back; partitioned inference what runs it.
        self.optimizer: Any = inner if type(self._flat) is flat_optimizer.FlatOptimizer else self._flat or self._offload
        self.basic_optimizer = inner
        self.training_dataloader = self.deepspeed_io(training_data) if training_data is not None else None
        self._watched = doctor.start(self._config.hang_timeout_s)
        if self._config.dump_state:
            self.print_config()

    # -- the three phases --------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the wrapped module and returns its output unchanged."""
        doctor.now.phase = "forward"
        try:
            with self._progress.phase("forward"), self._autocast():
                if self._precision.cast_inputs:
                    args, kwargs = self._cast_inputs(args), self._cast_inputs(kwargs)
                with self._offload.watching() if self._offload is not None else contextlib.nullcontext():
                    return self.module(*args, **kwargs)
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            if self._offload is not None:  # these pass the hooks of modules by
                self._offload.coordinator.abort()
            raise

    def backward(
        self, loss: torch.Tensor, scale_wrt_gas: bool = True, retain_graph: bool = False, **kwargs: Any
    ) -> torch.Tensor:
        """Accumulates the gradient of the mean over micro-batches; reduces over ranks where the stage does.

        ``scale_wrt_gas=False``: the loss is already divided by the accumulation steps. Collective in reducing
        backwards. After an exception the window's gradients are dropped and the engine is ready for a new window.
        """
        flat = self._require_optimizer("backward")
        if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
            raise ValueError(
                "backward() needs a loss tensor that depends on trained parameters"
                + ("" if isinstance(loss, torch.Tensor) else f", not {type(loss).__name__}")
                + ": was it computed under no_grad, or from detached values?"
            )
        create_graph = kwargs.pop("create_graph", False)
        for name in kwargs:
            warning_once(f"backward() ignores the argument {name!r}")
        steps = self.gradient_accumulation_steps()
        doctor.now.phase = "backward"
        with self._progress.phase("backward"):
            scaled = loss / steps if scale_wrt_gas and steps > 1 else loss
            try:
                flat.backward(scaled, retain_graph=retain_graph or create_graph, create_graph=create_graph)
            except BaseException:
                if self._boundary is None:
                    self.micro_steps -= self.micro_steps % steps
                raise
        return loss

    def step(self, lr_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """At the accumulation boundary: clip, update, share the weights, zero the gradients, advance the schedule."""
        flat = self._require_optimizer("step")
        # In the first minutes, and not for a save after hours of training, when other files may be installed.
        load_now(dataloader, engine_loading, engine_saving, export, offload_states)
        if self.is_gradient_accumulation_boundary():
            doctor.now.phase = "step"
            with self._progress.phase("step"):
                flat.step()
            self._step_applied = flat.applied
            if flat.overflow:
                self.skipped_steps += 1
            elif flat.applied and self.lr_scheduler is not None:
                self.lr_scheduler.step(**(lr_kwargs or {}))
            self.global_steps += 1
            doctor.now.step, doctor.now.phase = self.global_steps, ""
            self.global_samples += self.train_batch_size()
            self._progress.after_step(
                self.global_steps, self.skipped_steps, self.get_lr(), self.get_mom(), self.train_batch_size()
            )
        else:
            flat.end_backward()
        self.micro_steps += 1

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> torch.Tensor:
        raise RuntimeError("train_batch() belongs to the pipeline engine; call forward, backward and step")

    # -- accumulation ------------------------------------------------------------------------------------------------

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the current micro-batch ends a window: as set by hand, else every ``gradient_accumulation_steps``."""
        if self._boundary is not None:
            return self._boundary
        return (self.micro_steps + 1) % self.gradient_accumulation_steps() == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Decides the boundary by hand, from now on. Then call ``step()`` only at boundaries."""
        if self._flat is not None:
            self._flat.end_backward()  # a plain loss.backward() before was not of the coming micro-batch
        self._boundary = bool(is_boundary)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside accumulate locally, whatever the stage; the next one outside reduces it all.

        Stage 2 then holds whole gradients until that reduction.
        """
        before, self._accumulate_only = self._accumulate_only, True
        try:
            yield
        finally:
            self._accumulate_only = before

    def _reduces_now(self) -> bool:
        if self._accumulate_only:
            return False
        return self.zero_optimization_stage() >= 2 or self.is_gradient_accumulation_boundary()

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Changes the accumulation steps so that a step sees this many samples; the micro-batch stays."""
        per_micro_step = self.train_micro_batch_size_per_gpu() * dist.get_world_size(self.dp_process_group)
        if train_batch_size <= 0 or train_batch_size % per_micro_step:
            raise ValueError(
                f"train batch size {train_batch_size} is not a positive multiple of micro batch x data-parallel ranks "
                f"= {self.train_micro_batch_size_per_gpu()} x {per_micro_step // self.train_micro_batch_size_per_gpu()}"
            )
        self._config.set_batch(accumulation=train_batch_size // per_micro_step)

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Changes the samples per rank and backward; the accumulation steps stay."""
        if micro_batch_size <= 0:
            raise ValueError(f"micro batch size must be positive, not {micro_batch_size}")
        self._config.set_batch(micro_batch=micro_batch_size)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops all gradients, also those accumulated since the last step."""
        if self._flat is not None:
            self._flat.zero_grad()
        self.module.zero_grad(set_to_none=True)

    # -- facts about the run -----------------------------------------------------------------------------------------

    def get_global_grad_norm(self) -> float | None:
        """Norm of the last step's gradients before clipping, the same on all ranks; None before the first step."""
        return self._flat.grad_norm if self._flat is not None else None

    def was_step_applied(self) -> bool:
        """Whether the last boundary ``step()`` changed the weights; False if it was skipped."""
        return self._step_applied

    @property
    def overflow(self) -> bool:
        return self._flat is not None and self._flat.overflow

    def get_lr(self) -> list[float]:
        """Current learning rate of each parameter group."""
        return [group["lr"] for group in self._groups() if "lr" in group]

    def get_mom(self) -> list[Any]:
        """Current momentum (or betas) of each parameter group."""
        return [group.get("betas", group.get("momentum", 0.0)) for group in self._groups()]

    def _groups(self) -> list[dict[str, Any]]:
        return self.basic_optimizer.param_groups if self.basic_optimizer is not None else []

    @property
    def loss_scale(self) -> float:
        return self._flat.loss_scale if self._flat is not None else 1.0

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss as ``backward`` would take it: divided by the accumulation steps, times the loss scale.

        ``engine.scale(loss).backward()`` gives the gradients of ``engine.backward(loss)``.
        """
        steps = self.gradient_accumulation_steps()
        scaled = loss / steps if steps > 1 else loss
        return scaled * self.loss_scale if self.loss_scale != 1.0 else scaled

    def get_batch_info(self) -> tuple[int, int, int]:
        """Train batch, micro batch, accumulation steps."""
        return self.train_batch_size(), self.train_micro_batch_size_per_gpu(), self.gradient_accumulation_steps()

    def get_data_types(self) -> tuple[torch.dtype, torch.dtype]:
        """Dtype of the weights and of gradient sums."""
        weights = self._precision.param_dtype or torch.float32
        return weights, self._precision.accum_dtype_of(weights)

    @property
    def dp_world_size(self) -> int:
        return dist.get_world_size(self.dp_process_group)

    @property
    def global_rank(self) -> int:
        return dist.get_rank()

    @property
    def local_rank(self) -> int:
        return dist.get_local_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    # -- data --------------------------------------------------------------------------------------------------------

    def deepspeed_io(
        self,
        dataset: Any,
        batch_size: int | None = None,
        route: str = "train",
        pin_memory: bool = True,
        data_sampler: Any = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_local_io_workers: int | None = None,
    ) -> dataloader.DeepSpeedDataLoader:
        """A loader with this rank's share of ``dataset``; shuffled for ``route="train"``, in order otherwise."""
        return dataloader.DeepSpeedDataLoader(
            dataset,
            batch_size or self.train_micro_batch_size_per_gpu(),
            rank=dist.get_rank(self.dp_process_group),
            world_size=self.dp_world_size,
            shuffle=route == "train",
            drop_last=self.dataloader_drop_last(),
            pin_memory=pin_memory,
            collate_fn=collate_fn or self.collate_fn,
            sampler=data_sampler,
            num_workers=num_local_io_workers or 0,
        )

    # -- weights and checkpoints -------------------------------------------------------------------------------------

    def module_state_dict(
        self,
        destination: Any = None,
        prefix: str = "",
        keep_vars: bool = False,
        exclude_frozen_parameters: bool = False,
    ) -> dict[str, Any]:
        """The wrapped module's state dict, optionally without frozen parameters (buffers stay).

        With ZeRO-3, parameters that are not whole now are tensors on the meta device.
        """
        extra = {} if destination is None else {"destination": destination}
        state = self.module.state_dict(**extra, prefix=prefix, keep_vars=keep_vars)
        if exclude_frozen_parameters:
            for name, param in self.module.named_parameters(remove_duplicate=False):
                if not param.requires_grad:
                    state.pop(prefix + name, None)
        return state

    def load_module_state_dict(
        self, state_dict: dict[str, Any], strict: bool = True, custom_load_fn: Callable[..., Any] | None = None
    ) -> None:
        """Loads weights into the module and makes the fp32 masters follow.

        With ZeRO-3 every rank gives the same whole state dict, and takes its own part of it. Not collective.
        """
        guard.before_change()
        if custom_load_fn is not None:
            custom_load_fn(src=state_dict, dst=self.module)
        else:
            self.module.load_state_dict(state_dict, strict=strict)
        if self._flat is not None:
            self._flat.refresh_master()

    def save_16bit_model(
        self, save_dir: str, save_filename: str = "pytorch_model.bin", exclude_frozen_parameters: bool = False
    ) -> bool:
        """Writes the model's weights, in the model's dtype, to one file on rank 0. True when saved. Collective.

        With ZeRO-3, rank 0 needs host memory for the whole model. Without ``stage3_gather_16bit_weights_on_model_save``
        nothing is saved, which a warning says, and False returned.
        """
        return engine_saving.save_weights(self, save_dir, save_filename, exclude_frozen_parameters)

    save_fp16_model = save_16bit_model

    def export_safetensors(
        self,
        save_dir: str,
        dtype: torch.dtype | str | None = None,
        max_shard_size: int | str | None = "5GB",
        exclude_frozen_parameters: bool = False,
    ) -> list[str]:
        """Writes the weights as Hugging Face-style safetensors, each rank some of the files. Collective.

        Put ``config.json`` beside them, and ``from_pretrained`` loads the folder. An earlier export there is replaced. A
        rank needs memory for one parameter at most.

        Args:
            save_dir: a folder that all ranks see.
            dtype: of floating-point parameters: fp32, bf16 or fp16. None is the model's; others come from the fp32
                masters. Buffers keep theirs.
            max_shard_size: largest file in bytes, such as "5GB"; None writes one file.
            exclude_frozen_parameters: leave out parameters that need no gradient.

        Returns:
            Names of the weight files. Tied weights are stored once, under their first name.

        Raises:
            ValueError, OSError: on all ranks, and the folder keeps an earlier export: a parameter has no values, a
                rank cannot write, or values do not fit float16.
        """
        return export.export_safetensors(self, save_dir, dtype, max_shard_size, exclude_frozen_parameters)

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Writes ``save_dir/tag`` (default ``global_step<N>``) and points ``latest`` at it. Collective.

        ``client_state`` holds plain values and tensors; :meth:`load_checkpoint` gives them back. True when saved; with
        ``checkpoint.async_save``, when it has begun, and errors are raised by the next save, load or :meth:`destroy`.
        """
        return engine_saving.save(self, save_dir, tag, client_state or {}, save_latest, exclude_frozen_parameters)

    def load_checkpoint(
        self,
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Loads ``load_dir/tag`` (default: what ``latest`` names). Returns its path and the client state. Collective.

        ``(None, None)`` if there is no ``latest``; a ``CheckpointError`` on every rank, and an unchanged engine, if
        the checkpoint is damaged or of another model.
        """
        engine_saving.settle(self)
        what = engine_loading.LoadWhat(
            strict=load_module_strict,
            optimizer=load_optimizer_states and not load_module_only,
            scheduler=load_lr_scheduler_states and not load_module_only,
            counters=not load_module_only,
            custom_load_fn=custom_load_fn,
        )
        return engine_loading.load(self, load_dir, tag, what)

    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any] | None:
        """The whole model's state dict on rank 0 in host memory, None on the others. Collective.

        Raises:
            ValueError: ZeRO-3 without ``stage3_gather_16bit_weights_on_model_save``, unless frozen parameters are left out
                (an adapter's weights are few).
        """
        return engine_saving.consolidated(self, exclude_frozen_parameters)

    def _consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any] | None:
        return engine_saving.consolidated(self, exclude_frozen_parameters)

    @functools.cached_property
    def _saver(self) -> save.Saver:
        """Runs this engine's saves."""
        return save.Saver()

    # -- life --------------------------------------------------------------------------------------------------------

    def compile(self, backend: str = "inductor", compile_kwargs: dict[str, Any] | None = None, **_: Any) -> None:  # type: ignore[override]
        """Compiles the wrapped module in place with ``torch.compile``."""
        self.module.compile(backend=backend, **(compile_kwargs or {}))

    def destroy(self) -> None:
        """Waits for a checkpoint that is being saved, removes hooks and frees gradient buffers. Idempotent.

        The module keeps its weights.

        Raises:
            CheckpointError: the checkpoint that was being saved in the background was not.
        """
        try:
            if "_saver" in vars(self):
                self._saver.settle()
        finally:
            self._release()

    def _release(self) -> None:
        if self._flat is not None:
            self._flat.destroy()
        if self._offload is not None:
            self._offload.destroy()
        if self._watched:
            self._watched = False
            doctor.stop()

    def empty_partition_cache(self) -> None:
        """Frees what stage 3 keeps gathered between uses; it comes back when next used. Below stage 3, nothing."""
        if self._offload is not None:
            self._offload.empty_partition_cache()

    def offload_states(
        self,
        include: Container[OffloadStateTypeEnum] | None = None,
        device: OffloadDeviceEnum | str = "cpu",
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """Moves states to host memory until :meth:`reload_states`, to make room on the device; between two steps.

        Gradients of a finished step are freed instead. States that ``offload_optimizer`` keeps elsewhere stay there. Until
        they are back, ``backward``, ``step`` and ``load_checkpoint`` refuse. Not collective, but on all ranks alike.

        Args:
            include: kinds of state; None is all.
            device: ``cpu``.
            pin_memory: into page-locked memory, which is copied faster.
            non_blocking: do not wait for the copies.

        Raises:
            ValueError: another device, or an unknown kind.
            RuntimeError: the engine holds gradients that no step has used.
        """
        offload_states.offload(self._require_optimizer("offload_states"), include, device, pin_memory, non_blocking)

    def reload_states(self, non_blocking: bool = False) -> None:
        """Brings back what :meth:`offload_states` moved. Collective with ZeRO-3."""
        offload_states.reload(self._require_optimizer("reload_states"), non_blocking)

    def _require_optimizer(self, what: str) -> flat_optimizer.FlatOptimizer:
        if self._flat is None:
            raise RuntimeError(
                f"engine.{what}() needs an optimizer: pass one to deepspeed.initialize, or name one in the config "
                '("optimizer": {"type": ...}), together with trainable parameters'
            )
        return self._flat

    @contextlib.contextmanager
    def _autocast(self) -> Iterator[None]:
        if not self._config.torch_autocast.enabled:
            yield
            return
        # The cache would keep a cast of every weight until the forward ends, also of those that stage 3 releases.
        cache = self.zero_optimization_stage() < 3
        with torch.autocast(self.device.type, dtype=self._config.autocast_dtype, cache_enabled=cache):
            yield

    def _cast_inputs(self, inputs: Any) -> Any:
        dtype = self._precision.param_dtype
        return map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)

    def __getattr__(self, name: str) -> Any:
        """Attributes that neither the engine nor nn.Module has are the wrapped module's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is None:
                raise
            return getattr(module, name)
