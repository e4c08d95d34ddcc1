"""Plain-torch references for the engine: DDP in fp32, and an emulation of 16-bit training with the same casts."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import deepspeed
import tests.helpers.engine_parts  # noqa: F401
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from tests.helpers.models import Tricky, batches

# What torch and we import at first use is imported here, once, before ranks are forked.
torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1).step()

# How a kind of model is built, and whether micro-batch i of rank r uses the optional layer.
KINDS = {
    "plain": {},
    "tied": {"tied": True},
    "reused": {"reused": True},
    "unused_somewhere": {"unused": True},
    "unused_everywhere": {"unused": True},
    "frozen": {"frozen": True},
    "lora": {"lora": True},
}
BATCH = 2


def use_extra(kind: str, rank: int, index: int) -> bool:
    return kind == "unused_somewhere" and (rank + index) % 2 == 1


def make_model(kind: str, seed: int = 3) -> Tricky:
    torch.manual_seed(seed)
    return Tricky(**KINDS[kind])


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@dataclass
class Trace:
    """What a run shows on this rank: losses by micro-batch, norms by window, last gradients, final weights."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    grads: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def make_optimizer(name: str, params) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(params, lr=0.1)
    if name == "momentum":
        return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01)
    # A large eps keeps Adam from turning rounding noise of tiny gradients into full steps.
    return torch.optim.AdamW(params, lr=0.01, eps=1e-4, weight_decay=0.1)


def run_ddp(kind: str, rank: int, *, accumulation: int, clip: float, optimizer: str, windows: int = 2) -> Trace:
    model = make_model(kind)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    params = trained(model)
    torch_optimizer = make_optimizer(optimizer, params.values())
    trace = Trace()
    data = iter(enumerate(batches(rank, windows * accumulation, BATCH)))
    for _ in range(windows):
        for micro in range(accumulation):
            index, (x, y) = next(data)
            with wrapped.no_sync() if micro + 1 < accumulation else contextlib.nullcontext():
                loss = wrapped(x, y, use_extra(kind, rank, index))
                trace.losses.append(float(loss.detach()))
                (loss / accumulation).backward()
        trace.grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in params.items()}
        trace.norms.append(float(torch.nn.utils.clip_grad_norm_(params.values(), clip or float("inf"))))
        torch_optimizer.step()
        torch_optimizer.zero_grad()
    trace.weights = {n: p.detach().clone() for n, p in params.items()}
    return trace


def make_engine(model: torch.nn.Module, config: dict, optimizer="sgd", **kwargs):
    """An engine over the model; ``optimizer`` is a name of :func:`make_optimizer` or an optimizer."""
    if isinstance(optimizer, str):
        optimizer = make_optimizer(optimizer, trained(model).values())
    full = {"train_micro_batch_size_per_gpu": BATCH, "zero_allow_untested_optimizer": True, **config}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=full, **kwargs)[0]


def run_engine(kind: str, rank: int, config: dict, *, optimizer: str | None, windows: int = 2, model=None) -> Trace:
    """The same training through the engine, protocol B: ``step`` after every micro-batch."""
    model = make_model(kind) if model is None else model
    engine = make_engine(model, config, optimizer)
    accumulation = engine.gradient_accumulation_steps()
    trace = Trace()
    try:
        for index, (x, y) in enumerate(batches(rank, windows * accumulation, BATCH)):
            loss = engine(x, y, use_extra(kind, rank, index))
            trace.losses.append(float(loss.detach()))
            engine.backward(loss)
            if engine.global_steps == windows - 1 and engine.is_gradient_accumulation_boundary():
                trace.grads = {n: safe_get_full_grad(p) for n, p in trained(model).items()}
            before = engine.global_steps
            engine.step()
            if engine.global_steps > before:
                trace.norms.append(float(engine.get_global_grad_norm()))
        with deepspeed.zero.GatheredParameters(trained(model).values()):
            for name, param in trained(model).items():
                weights = param.detach().clone()
                if param.dtype != torch.float32:
                    weights = safe_get_full_fp32_param(param)
                    assert torch.equal(param, weights.to(param.dtype)), f"{name}: weights are not the rounded masters"
                trace.weights[name] = weights
    finally:
        engine.destroy()
    return trace


def run_emulated(
    kind: str,
    rank: int,
    dtype: torch.dtype,
    *,
    accumulation: int,
    clip: float,
    optimizer: str,
    stage: int,
    scale: float = 1.0,
    windows: int = 2,
) -> Trace:
    """16-bit training in plain torch with the casts that the engine documents.

    Weights and gradients of a micro-batch in 16 bit, masters and sums over micro-batches in fp32; what travels is
    rounded to 16 bit (stages 0 and 1: the sum of the window; stage 2: each micro-batch), the sum over ranks is fp32.
    Stage 0 without accumulation also shares the mean in 16 bit.
    """
    world = dist.get_world_size()
    model = make_model(kind)
    params = trained(model)
    masters = {n: p.detach().clone() for n, p in params.items()}
    for param in model.parameters():
        param.data = param.data.to(dtype)
    torch_optimizer = make_optimizer(optimizer, masters.values())
    trace = Trace()
    data = iter(enumerate(batches(rank, windows * accumulation, BATCH)))
    for _ in range(windows):
        sums = {n: torch.zeros_like(m) for n, m in masters.items()}
        for _ in range(accumulation):
            index, (x, y) = next(data)
            loss = model(x, y, use_extra(kind, rank, index))
            trace.losses.append(float(loss.detach()))
            (loss / accumulation * scale).backward()
            for name, param in params.items():
                if param.grad is not None:
                    sums[name] += param.grad.float()
                    param.grad = None
        wire = torch.cat([total.reshape(-1) for total in sums.values()])
        wire = wire if stage == 2 else wire.to(dtype).float()
        dist.all_reduce(wire)
        pieces = (wire / world).split([total.numel() for total in sums.values()])
        means = {}
        for (name, master), piece in zip(masters.items(), pieces, strict=True):
            mean = piece.view(master.shape)
            means[name] = mean / scale
            applied = mean.to(dtype).float() if stage == 0 and accumulation == 1 else mean
            master.grad = applied / scale
        trace.grads = means
        trace.norms.append(float(torch.linalg.vector_norm(torch.stack([m.norm() for m in means.values()]))))
        factor = min(1.0, clip / (trace.norms[-1] + 1e-6)) if clip else 1.0
        for master in masters.values():
            master.grad *= factor
        torch_optimizer.step()
        for name, param in params.items():
            param.data.copy_(masters[name])
    trace.weights = masters
    return trace


def assert_close(ours: Trace, theirs: Trace, *, rtol: float, atol: float, what: str) -> None:
    """Losses, norms, gradients and weights; ``atol`` is relative to the largest element of all gradients or weights."""
    assert len(ours.losses) == len(theirs.losses) and len(ours.norms) == len(theirs.norms), what
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=rtol, atol=atol, msg=lambda m: f"{what}: losses {m}")
    torch.testing.assert_close(ours.norms, theirs.norms, rtol=rtol, atol=atol, msg=lambda m: f"{what}: norms {m}")
    _assert_tensors(ours.grads, theirs.grads, rtol, atol, f"{what}: gradient")
    _assert_tensors(ours.weights, theirs.weights, rtol, atol, f"{what}: weights")


def _assert_tensors(mine: dict, other: dict, rtol: float, atol: float, what: str) -> None:
    assert mine.keys() == other.keys(), what
    largest = max(float(value.abs().max()) for value in other.values() if value.numel())
    for name, value in other.items():
        assert mine[name].shape == value.shape, f"{what} of {name}"
        torch.testing.assert_close(
            mine[name], value, rtol=rtol, atol=atol * largest, msg=lambda m, n=name: f"{what} of {n}: {m}"
        )


def assert_equal(ours: Trace, theirs: Trace, what: str) -> None:
    """Bit for bit; norms are not compared, they are sums in another order."""
    assert ours.losses == theirs.losses, f"{what}: losses {ours.losses} and {theirs.losses}"
    for mine, other in ((ours.grads, theirs.grads), (ours.weights, theirs.weights)):
        for name, value in other.items():
            if value.numel():
                assert torch.equal(mine[name], value), f"{what}: {name} differs by {(mine[name] - value).abs().max():g}"
