"""Optimizer update rules on flat tensors: one pass over memory, tile by tile.

[Note: tiles]
An optimizer step does little arithmetic per byte, so it costs what its memory traffic costs. A mixed-precision
step has more to do than the update: turn a 16-bit gradient into fp32, unscale and clip it, and write 16-bit
weights. Each of these as a pass of its own would read main memory again. So every rule here walks over tiles
that fit the cache: convert the gradient into a small scratch tile, update master weights and moments in place, and
write the 16-bit weights while the tile is still in cache. Nothing of the size of the whole tensor is allocated.

All functions
 - take 1-D contiguous tensors of one numel on one device, any floating dtype, and work in fp32 (fp64 if ``p`` is fp64);
 - update ``p`` and the state tensors in place and never write to ``grad``;
 - use the gradient ``grad * grad_scale`` (``grad_scale`` is the product of 1 / loss scale and the clip factor);
 - write the updated weights to ``lowp_out`` (if given) with its dtype's rounding.
None of them is collective and none makes the host wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deepspeed._core.step import native

__all__ = ["adagrad_", "adam_", "adam_many_", "check_flat", "compute_dtype", "lamb_", "lion_"]

# Elements a tile. CPU, measured on 2 cores with 1 MB of L2 each and 33M elements: below 2^18 the restarts of the
# hardware prefetcher and the thread barriers cost more than the cache saves, above 2^19 the tile leaves the cache.
# Rules made of several eager operations reread the tile each time, so theirs is smaller.
# Accelerators: only the size of the scratch matters (64 MiB in fp32), launches must be few.
CPU_TILE_NUMEL = 1 << 19
CPU_EAGER_TILE_NUMEL = 1 << 17
DEVICE_TILE_NUMEL = 1 << 24

_FUSED_DEVICES = ("cpu", "cuda")

Update = Callable[..., None]


def compute_dtype(p: Tensor) -> torch.dtype:
    """The dtype in which an update of ``p`` is computed: fp32, or fp64 for fp64 weights."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def check_flat(p: Tensor, named: dict[str, Tensor | None]) -> None:
    """Raises ``ValueError`` naming the first tensor that does not fit ``p`` (numel, device, floating dtype, layout)."""
    for name, t in {"p": p, **named}.items():
        if t is None:
            continue
        if t.layout is not torch.strided:
            raise ValueError(f"{name} has layout {t.layout}; our optimizers need dense tensors (use sparse=False)")
        if not t.is_floating_point():
            raise ValueError(f"{name} has dtype {t.dtype}; a floating dtype is needed")
        if t.numel() != p.numel():
            raise ValueError(f"{name} has {t.numel()} elements but the weights have {p.numel()}; they must be equal")
        if t.device != p.device:
            raise ValueError(f"{name} is on {t.device} but the weights are on {p.device}; move one of them")


def _has_fused(name: str, device: torch.device) -> bool:
    # Private names: torch 2.6 has adam and adamw on both devices and adagrad on the CPU only.
    return (
        hasattr(torch, name) and device.type in _FUSED_DEVICES and (name != "_fused_adagrad_" or device.type == "cpu")
    )


class _Scratch:
    """One reusable tile of scratch memory, allocated at first use."""

    def __init__(self, numel: int, like: Tensor) -> None:
        self._numel, self._dtype, self._device = numel, compute_dtype(like), like.device
        self._tile: Tensor | None = None

    def __call__(self, numel: int) -> Tensor:
        if self._tile is None:
            self._tile = torch.empty(self._numel, dtype=self._dtype, device=self._device)
        return self._tile if numel == self._numel else self._tile[:numel]


def _tile_numel(p: Tensor, fused: bool) -> int:
    if p.device.type != "cpu":
        tile = DEVICE_TILE_NUMEL
    else:
        tile = CPU_TILE_NUMEL if fused else CPU_EAGER_TILE_NUMEL
    return min(tile, max(p.numel(), 1))


def _one_dtype(p: Tensor, *others: Tensor) -> bool:
    return all(t.dtype == compute_dtype(p) for t in (p, *others))


def _for_tiles(
    update: Update,
    p: Tensor,
    grad: Tensor | None,
    states: Sequence[Tensor],
    *,
    tile: int,
    grad_scale: float = 1.0,
    lowp_out: Tensor | None = None,
) -> None:
    """Calls ``update(p_tile, grad_tile, *state_tiles)`` with tiles in the compute dtype (1-D), in memory order.

    Tensors that have this dtype are passed as views; others go through scratch and are written back.
    """
    dtype = compute_dtype(p)
    owned = [p, *states]
    owned_scratch = [None if t.dtype == dtype else _Scratch(tile, p) for t in owned]
    grad_scratch = _Scratch(tile, p)
    scaled = grad is not None and grad_scale != 1.0
    owned_tiles = zip(*(t.split(tile) for t in owned), strict=True)
    grad_tiles = grad.split(tile) if grad is not None else None
    out_tiles = lowp_out.split(tile) if lowp_out is not None else None
    for i, views in enumerate(owned_tiles):
        n = views[0].numel()
        work = [v if s is None else s(n).copy_(v) for v, s in zip(views, owned_scratch, strict=True)]
        if grad_tiles is None:
            update(*work)
        else:
            g = grad_tiles[i]
            if g.dtype != dtype:
                g = grad_scratch(n).copy_(g)
                if scaled:
                    g.mul_(grad_scale)
            elif scaled:
                g = torch.mul(g, grad_scale, out=grad_scratch(n))
            update(work[0], g, *work[1:])
        for v, w, s in zip(views, work, owned_scratch, strict=True):
            if s is not None:
                v.copy_(w)
        if out_tiles is not None:
            out_tiles[i].copy_(work[0])


# ---------------------------------------------------------------------------------------------------------- Adam


def _adam_step_tensor(step: float, bias_correction: bool, device: torch.device) -> Tensor:
    # Both corrections are 1 - beta ** step. Without correction they are 1, which is their value at step infinity:
    # so one fused kernel serves both modes, with no second formula to keep equal.
    return torch.full((), step if bias_correction else math.inf, dtype=torch.float32, device=device)


def _adam_eager(
    scratch: Sequence[_Scratch],
    *,
    step: float,
    lr: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    bias_correction: bool,
) -> Update:
    """The formulas of the fused kernels, for devices or torch versions without them."""
    beta1, beta2 = betas
    correction1 = 1.0 - beta1**step if bias_correction else 1.0
    correction2_sqrt = math.sqrt(1.0 - beta2**step) if bias_correction else 1.0

    def update(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> None:
        denom = scratch[0](p.numel())
        if weight_decay != 0.0:
            if decoupled:
                p.mul_(1.0 - lr * weight_decay)
            else:
                g = torch.add(g, p, alpha=weight_decay, out=scratch[1](p.numel()))
        m.lerp_(g, 1.0 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
        torch.sqrt(v, out=denom).div_(correction2_sqrt).add_(eps)
        p.addcdiv_(m, denom, value=-lr / correction1)

    return update


def adam_(
    p: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: float,
    lr: float,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    bias_correction: bool = True,
    grad_scale: float = 1.0,
    lowp_out: Tensor | None = None,
) -> None:
    """One Adam step (Kingma and Ba 2015); ``decoupled`` weight decay is AdamW (Loshchilov and Hutter 2019), else L2.

    ``step`` counts from 1. With fp32 tensors, ``grad_scale`` 1 and no ``lowp_out`` it is one fused call.
    """
    if p.numel() == 0:
        return
    if native.takes(p, grad, (exp_avg, exp_avg_sq), lowp_out):
        native.native_adam_(
            p, grad, exp_avg, exp_avg_sq, step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
            decoupled=decoupled, bias_correction=bias_correction, grad_scale=grad_scale, lowp_out=lowp_out,
        )  # fmt: skip
        return
    name = "_fused_adamw_" if decoupled else "_fused_adam_"
    if not _has_fused(name, p.device):
        tile = _tile_numel(p, fused=False)
        update = _adam_eager(
            [_Scratch(tile, p), _Scratch(tile, p)], step=step, lr=lr, betas=betas, eps=eps,
            weight_decay=weight_decay, decoupled=decoupled, bias_correction=bias_correction,
        )  # fmt: skip
        _for_tiles(update, p, grad, (exp_avg, exp_avg_sq), tile=tile, grad_scale=grad_scale, lowp_out=lowp_out)
        return
    kernel = getattr(torch, name)
    steps = [_adam_step_tensor(step, bias_correction, p.device)]
    beta1, beta2 = betas

    def fused(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> None:
        kernel(
            [p], [g], [m], [v], [], steps, lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps,
            amsgrad=False, maximize=False,
        )  # fmt: skip

    plain = grad_scale == 1.0 and lowp_out is None and _one_dtype(p, grad, exp_avg, exp_avg_sq)
    tile = p.numel() if plain else _tile_numel(p, fused=True)
    _for_tiles(fused, p, grad, (exp_avg, exp_avg_sq), tile=tile, grad_scale=grad_scale, lowp_out=lowp_out)


def adam_many_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step: float,
    lr: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    bias_correction: bool,
) -> None:
    """:func:`adam_` for many tensors at the same ``step``, in one fused call where there is one.

    All are contiguous, of one dtype and device and of any shape; entry i of each list has the same numel.
    """
    if not params:
        return
    name = "_fused_adamw_" if decoupled else "_fused_adam_"
    if not _has_fused(name, params[0].device):
        for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
            adam_(
                p.view(-1), g.view(-1), m.view(-1), v.view(-1), step=step, lr=lr, betas=betas, eps=eps,
                weight_decay=weight_decay, decoupled=decoupled, bias_correction=bias_correction,
            )  # fmt: skip
        return
    step_t = _adam_step_tensor(step, bias_correction, params[0].device)
    getattr(torch, name)(
        params, grads, exp_avgs, exp_avg_sqs, [], [step_t] * len(params), lr=lr, beta1=betas[0], beta2=betas[1],
        weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ Adagrad and Lion


def adagrad_(
    p: Tensor,
    grad: Tensor,
    square_sum: Tensor,
    *,
    step: float,
    lr: float,
    lr_decay: float = 0.0,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
    lowp_out: Tensor | None = None,
) -> None:
    """One Adagrad step (Duchi et al. 2011) with L2 weight decay, as ``torch.optim.Adagrad``; ``step`` counts from 1."""
    if p.numel() == 0:
        return
    use_fused = _has_fused("_fused_adagrad_", p.device)
    plain = grad_scale == 1.0 and lowp_out is None and _one_dtype(p, grad, square_sum)
    tile = p.numel() if use_fused and plain else _tile_numel(p, fused=use_fused)
    if use_fused:
        step_t = torch.full((), step, dtype=torch.float32)

        def update(p: Tensor, g: Tensor, total: Tensor) -> None:
            torch._fused_adagrad_(
                [p], [g], [total], [step_t], lr=lr, lr_decay=lr_decay, weight_decay=weight_decay, eps=eps,
                maximize=False,
            )  # fmt: skip
    else:
        rate = lr / (1.0 + (step - 1.0) * lr_decay)
        denom, decayed = _Scratch(tile, p), _Scratch(tile, p)

        def update(p: Tensor, g: Tensor, total: Tensor) -> None:
            if weight_decay != 0.0:
                g = torch.add(g, p, alpha=weight_decay, out=decayed(p.numel()))
            total.addcmul_(g, g)
            p.addcdiv_(g, torch.sqrt(total, out=denom(p.numel())).add_(eps), value=-rate)

    _for_tiles(update, p, grad, (square_sum,), tile=tile, grad_scale=grad_scale, lowp_out=lowp_out)


def lion_(
    p: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    *,
    lr: float,
    betas: Sequence[float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
    lowp_out: Tensor | None = None,
) -> None:
    """One Lion step (Chen et al. 2023, algorithm 2): ``p -= lr * (sign(beta1 m + (1 - beta1) g) + weight_decay p)``."""
    if p.numel() == 0:
        return
    beta1, beta2 = betas
    tile = _tile_numel(p, fused=False)
    direction = _Scratch(tile, p)

    def update(p: Tensor, g: Tensor, m: Tensor) -> None:
        sign = torch.lerp(m, g, 1.0 - beta1, out=direction(p.numel())).sign_()
        if weight_decay != 0.0:
            p.mul_(1.0 - lr * weight_decay)
        p.add_(sign, alpha=-lr)
        m.lerp_(g, 1.0 - beta2)

    _for_tiles(update, p, grad, (exp_avg,), tile=tile, grad_scale=grad_scale, lowp_out=lowp_out)


# ---------------------------------------------------------------------------------------------------------- LAMB


def lamb_(
    p: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: float,
    lr: float,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    min_coeff: float = 0.01,
    max_coeff: float = 10.0,
    bias_correction: bool = True,
    eps_inside_sqrt: bool = False,
    grad_scale: float = 1.0,
    lowp_out: Tensor | None = None,
) -> Tensor:
    """One LAMB step (You et al. 2020, algorithm 2). ``p`` must be a whole parameter: its norm enters the update.

    ``u = m_hat / (sqrt(v_hat) + eps) + weight_decay * p`` and ``p -= lr * c * u`` with the coefficient
    ``c = clamp(|p| / |u|, min_coeff, max_coeff)``, or 1 where one of the norms is 0. Returns ``c``, 0-d, on p's device.
    """
    if p.numel() == 0:
        return torch.ones((), device=p.device)
    beta1, beta2 = betas
    correction1 = 1.0 - beta1**step if bias_correction else 1.0
    correction2 = 1.0 - beta2**step if bias_correction else 1.0
    tile = _tile_numel(p, fused=False)
    direction = _Scratch(tile, p)
    squares = torch.zeros(2, dtype=torch.float64, device=p.device)  # |p|^2, |u|^2

    def direction_of(p: Tensor, m: Tensor, v: Tensor) -> Tensor:
        u = torch.div(v, correction2, out=direction(p.numel()))
        u = u.add_(eps).sqrt_() if eps_inside_sqrt else u.sqrt_().add_(eps)
        torch.div(m, u, out=u).div_(correction1)
        return u.add_(p, alpha=weight_decay)

    def moments_and_norms(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> None:
        m.lerp_(g, 1.0 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
        u = direction_of(p, m, v)
        norms = torch.stack((torch.linalg.vector_norm(p), torch.linalg.vector_norm(u)))
        squares.add_(norms.double().square_())

    # The weights wait for the norm of the whole update, so there are two passes; the second forms the update again
    # from the moments, which costs arithmetic but no memory of the size of the parameter.
    _for_tiles(moments_and_norms, p, grad, (exp_avg, exp_avg_sq), tile=tile, grad_scale=grad_scale)
    p_norm, u_norm = squares.sqrt_().unbind()
    both = (p_norm > 0) & (u_norm > 0)
    ratio = (p_norm / torch.where(both, u_norm, torch.ones_like(u_norm))).clamp_(min_coeff, max_coeff)
    coeff = torch.where(both, ratio, torch.ones_like(ratio)).to(compute_dtype(p))

    def apply(p: Tensor, m: Tensor, v: Tensor) -> None:
        p.sub_(direction_of(p, m, v).mul_(coeff).mul_(lr))

    _for_tiles(apply, p, None, (exp_avg, exp_avg_sq), tile=tile, lowp_out=lowp_out)
    return coeff
