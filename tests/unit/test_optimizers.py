"""Our optimizers against torch.optim and against plain formulas, alone and as the engine drives them."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed._core.step import kernels, native
from deepspeed.errors import ConfigError, MissingFeatureError
from deepspeed.ops import __compatible_ops__
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.aio import AsyncIOBuilder
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.ops.registry import build_optimizer, is_zero_tested, take_max_grad_norm

ALL = [FusedAdam, DeepSpeedCPUAdam, DeepSpeedCPUAdagrad, FusedLion, DeepSpeedCPULion, FusedLamb]
SHAPES = [(7,), (3, 5), (0, 4), (), (1,), (33, 31)]


@pytest.fixture(params=["fused", "eager"])
def kernel(request, monkeypatch):
    """Both implementations of the rules, over tiles that do not divide the sizes used here."""
    if request.param == "eager":
        monkeypatch.setattr(kernels, "_FUSED_DEVICES", ())
    monkeypatch.setattr(kernels, "CPU_TILE_NUMEL", 100)
    monkeypatch.setattr(kernels, "CPU_EAGER_TILE_NUMEL", 64)
    return request.param


def make_params(dtype=torch.float32, seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def set_grads(params, step, scale=1.0):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def tensors_of(optimizer, p):
    return {k: v for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}


def step_flat(optimizer, *, grad_dtype=torch.float32, scale=1.0, out_dtype=None):
    """Drives an optimizer as the engine does; returns the low-precision outputs."""
    outs = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            out = None if out_dtype is None else torch.full(p.shape, math.nan, dtype=out_dtype)
            grad = (p.grad.float() / scale).to(grad_dtype)
            optimizer.step_tensor(p, grad, group, grad_scale=scale, lowp_out=out)
            outs.append(out)
    return outs


# -------------------------------------------------------------------------------------------------- plain formulas


class PlainRule:
    """Update rules as the papers print them, in fp64, one element after the other in spirit: no tiles, no tricks."""

    def __init__(self, params, **h):
        self.h = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, **h}
        self.p = [p.detach().double().clone() for p in params]
        self.m = [torch.zeros_like(p) for p in self.p]
        self.v = [torch.zeros_like(p) for p in self.p]
        self.t = 0
        self.coeffs = [None] * len(self.p)

    def step(self, grads):
        self.t += 1
        for i, g in enumerate(grads):
            getattr(self, self.rule)(i, g.detach().double())


class PlainAdam(PlainRule):
    rule = "adam"

    def adam(self, i, g):
        (b1, b2), wd, lr = self.h["betas"], self.h["weight_decay"], self.h["lr"]
        if not self.h.get("decoupled", True):
            g = g + wd * self.p[i]
        self.m[i] = b1 * self.m[i] + (1 - b1) * g
        self.v[i] = b2 * self.v[i] + (1 - b2) * g * g
        c1, c2 = (1 - b1**self.t, 1 - b2**self.t) if self.h.get("bias_correction", True) else (1, 1)
        update = (self.m[i] / c1) / ((self.v[i] / c2).sqrt() + self.h["eps"])
        if self.h.get("decoupled", True):
            update = update + wd * self.p[i]
        self.p[i] = self.p[i] - lr * update


class PlainLion(PlainRule):
    rule = "lion"

    def lion(self, i, g):
        b1, b2 = self.h["betas"]
        update = torch.sign(b1 * self.m[i] + (1 - b1) * g) + self.h["weight_decay"] * self.p[i]
        self.p[i] = self.p[i] - self.h["lr"] * update
        self.m[i] = b2 * self.m[i] + (1 - b2) * g


class PlainLamb(PlainRule):
    rule = "lamb"

    def lamb(self, i, g):
        b1, b2 = self.h["betas"]
        self.m[i] = b1 * self.m[i] + (1 - b1) * g
        self.v[i] = b2 * self.v[i] + (1 - b2) * g * g
        c1, c2 = (1 - b1**self.t, 1 - b2**self.t) if self.h.get("bias_correction", True) else (1, 1)
        m, v = self.m[i] / c1, self.v[i] / c2
        inside = self.h.get("eps_inside_sqrt", False)
        u = m / ((v + self.h["eps"]).sqrt() if inside else v.sqrt() + self.h["eps"])
        u = u + self.h["weight_decay"] * self.p[i]
        w_norm, u_norm = self.p[i].norm(), u.norm()
        coeff = 1.0
        if w_norm > 0 and u_norm > 0:
            coeff = min(max((w_norm / u_norm).item(), self.h.get("min_coeff", 0.01)), self.h.get("max_coeff", 10.0))
        self.coeffs[i] = coeff
        self.p[i] = self.p[i] - self.h["lr"] * coeff * u


def assert_follows(optimizer, plain, params, steps=5, rtol=1e-5, atol=1e-6):
    for t in range(steps):
        set_grads(params, t)
        before = [p.grad.clone() for p in params]
        optimizer.step()
        plain.step(before)
        for p, grad, expected in zip(params, before, plain.p, strict=True):
            torch.testing.assert_close(p.detach().double(), expected, rtol=rtol, atol=atol)
            assert torch.equal(p.grad, grad), "step() must not change gradients"


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("bias_correction", [True, False])
def test_adam_formula(kernel, decoupled, bias_correction):
    h = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "bias_correction": bias_correction}
    params = make_params()
    plain = PlainAdam(params, decoupled=decoupled, **h)
    assert_follows(FusedAdam(params, adam_w_mode=decoupled, **h), plain, params)


@pytest.mark.parametrize("cls", [FusedLion, DeepSpeedCPULion])
def test_lion_formula(kernel, cls):
    h = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1}
    params = make_params()
    assert_follows(cls(params, **h), PlainLion(params, **h), params)


@pytest.mark.parametrize(
    "h",
    [
        {},
        {"weight_decay": 0.1, "eps": 1e-2, "eps_inside_sqrt": True},
        {"bias_correction": False},
        {"max_coeff": 0.5},
        {"min_coeff": 5.0},
    ],
)
def test_lamb_formula(kernel, h):
    h = {"lr": 0.01, **h}
    params = make_params(shapes=[(7,), (3, 5), (33, 31)])
    plain = PlainLamb(params, **h)
    optimizer = FusedLamb(params, **h)
    assert optimizer.get_lamb_coeffs() == []
    assert_follows(optimizer, plain, params, rtol=1e-4)
    assert optimizer.get_lamb_coeffs() == pytest.approx(plain.coeffs, rel=1e-4)


def test_lamb_coefficient_is_one_where_a_norm_is_zero(kernel):
    zero = torch.nn.Parameter(torch.zeros(5))
    still = torch.nn.Parameter(torch.ones(5))
    optimizer = FusedLamb([zero, still], lr=0.1)
    zero.grad, still.grad = torch.ones(5), torch.zeros(5)
    optimizer.step()
    assert optimizer.get_lamb_coeffs() == [1.0, 1.0]
    torch.testing.assert_close(zero.detach(), torch.full((5,), -0.1))
    assert torch.equal(still.detach(), torch.ones(5))


def test_lamb_clips_the_global_norm():
    free, clipped = make_params(), make_params()
    for params in (free, clipped):
        set_grads(params, 0, scale=3.0)
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in clipped))
    for p in free:
        p.grad.mul_(0.5 / (norm + 1e-6))
    # One step of Adam's ratio does not see the scale of the gradient: look at the moments, which do.
    a, b = FusedLamb(free), FusedLamb(clipped, max_grad_norm=0.5)
    a.step()
    b.step()
    for p, q in zip(free, clipped, strict=True):
        torch.testing.assert_close(a.state[p]["exp_avg"], b.state[q]["exp_avg"])


# ------------------------------------------------------------------------------------------------- against torch

TORCH_PAIRS = [
    (FusedAdam, {}, torch.optim.AdamW, {}),
    (FusedAdam, {"adam_w_mode": False}, torch.optim.Adam, {}),
    (DeepSpeedCPUAdam, {}, torch.optim.AdamW, {}),
    (DeepSpeedCPUAdam, {"adamw_mode": False}, torch.optim.Adam, {}),
    (DeepSpeedCPUAdagrad, {}, torch.optim.Adagrad, {}),
    (
        DeepSpeedCPUAdagrad,
        {"lr_decay": 0.1, "initial_accumulator_value": 0.2},
        torch.optim.Adagrad,
        {"lr_decay": 0.1, "initial_accumulator_value": 0.2},
    ),
]


@pytest.mark.parametrize(("cls", "kw", "torch_cls", "torch_kw"), TORCH_PAIRS)
def test_same_as_torch(kernel, cls, kw, torch_cls, torch_kw):
    common = {"lr": 0.01, "weight_decay": 0.1}
    ours, theirs = make_params(), make_params()
    a, b = cls(ours, **common, **kw), torch_cls(theirs, **common, **torch_kw)
    for t in range(6):
        set_grads(ours, t)
        set_grads(theirs, t)
        a.step()
        b.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
            state, expected = tensors_of(a, p), tensors_of(b, q)
            assert state.keys() == expected.keys()
            for name in state:
                torch.testing.assert_close(state[name], expected[name], rtol=1e-5, atol=1e-6)
                assert state[name].device == expected[name].device


def test_plain_fp32_adam_is_torchs_fused_call_bit_for_bit():
    ours, theirs = make_params(), make_params()
    a, b = FusedAdam(ours, weight_decay=0.1), torch.optim.AdamW(theirs, weight_decay=0.1, fused=True)
    for t in range(3):
        set_grads(ours, t)
        set_grads(theirs, t)
        a.step()
        b.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_with_fp32_state(kernel, cls, dtype):
    """Each step must be the fp32 step from the rounded weights, rounded once."""
    params = make_params(dtype)
    optimizer = cls(params, lr=0.01)
    masters = make_params()
    reference = cls(masters, lr=0.01)
    for t in range(4):
        set_grads(params, t)
        with torch.no_grad():
            for p, q in zip(params, masters, strict=True):
                q.copy_(p)
                q.grad = p.grad.float()
        optimizer.step()
        reference.step()
        for p, q in zip(params, masters, strict=True):
            torch.testing.assert_close(p.detach(), q.detach().to(dtype))
            for name in cls.state_names:
                assert optimizer.state[p][name].dtype == torch.float32
                torch.testing.assert_close(optimizer.state[p][name], reference.state[q][name])


@pytest.mark.parametrize("cls", [DeepSpeedCPUAdam, DeepSpeedCPUAdagrad, DeepSpeedCPULion])
def test_state_in_the_weights_dtype_when_asked(cls):
    params = make_params(torch.bfloat16)
    optimizer = cls(params, lr=0.1, fp32_optimizer_states=False)
    before = [p.detach().clone() for p in params]
    set_grads(params, 0)
    optimizer.step()
    for p, old in zip(params, before, strict=True):
        assert all(optimizer.state[p][name].dtype == torch.bfloat16 for name in cls.state_names)
        assert p.numel() == 0 or not torch.equal(p.detach(), old)


def test_fp64_weights_are_computed_in_fp64(kernel):
    params = make_params(torch.float64)
    plain = PlainAdam(params, lr=0.01)
    assert_follows(FusedAdam(params, lr=0.01), plain, params, rtol=1e-9, atol=1e-12)
    assert optimizer_dtype(FusedAdam(params, lr=0.01), params[0]) == torch.float64


def optimizer_dtype(optimizer, p):
    p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer.state[p]["exp_avg"].dtype


@pytest.mark.parametrize("cls", ALL)
def test_weights_in_any_memory_format(cls):
    base = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    plain = torch.nn.Parameter(base.clone())
    last = torch.nn.Parameter(base.clone().to(memory_format=torch.channels_last))
    sliced_base = torch.zeros(4, 3, 5, 12)
    sliced_base[..., ::2] = base
    sliced = sliced_base[..., ::2].requires_grad_()
    grad = torch.randn(base.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for p in (plain, last, sliced):
        p.grad = grad.clone()
        optimizer = cls([p.detach().requires_grad_()] if p is sliced else [p], lr=0.1)
        held = optimizer.param_groups[0]["params"][0]
        held.grad = grad.clone()
        optimizer.step()
        results.append(held.detach().clone())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert not sliced_base[..., 1::2].any()


# -------------------------------------------------------------------------------------- step_tensor, as the engine


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16, torch.float16])
def test_step_tensor_scales_converts_and_writes_low_precision(kernel, cls, grad_dtype, scale, out_dtype):
    ours, theirs = make_params(), make_params()
    a, b = cls(ours, lr=0.05, weight_decay=0.01), cls(theirs, lr=0.05, weight_decay=0.01)
    for t in range(3):
        set_grads(ours, t)
        for p, q in zip(ours, theirs, strict=True):
            p.grad = p.grad.to(grad_dtype).float()
            q.grad = p.grad.clone()
        outs = step_flat(a, grad_dtype=grad_dtype, scale=scale, out_dtype=out_dtype)
        b.step()
        for p, q, out in zip(ours, theirs, outs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
            assert a.state[p]["step"].item() == t + 1
            if out is not None:
                assert torch.equal(out, p.detach().to(out_dtype))


@given(
    numel=st.integers(0, 700),
    tile=st.integers(1, 300),
    grad_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    p_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scale=st.sampled_from([1.0, 0.5]),
    cls=st.sampled_from(ALL),
)
@settings(max_examples=80, deadline=None)
def test_any_size_in_any_tiles(numel, tile, grad_dtype, p_dtype, scale, cls):
    with pytest.MonkeyPatch.context() as patch:
        results = []
        for sizes in (1 << 20, tile):
            patch.setattr(kernels, "CPU_TILE_NUMEL", sizes)
            patch.setattr(kernels, "CPU_EAGER_TILE_NUMEL", sizes)
            (p,) = make_params(p_dtype, shapes=[(numel,)])
            optimizer = cls([p], lr=0.1)
            grad = torch.linspace(-1, 1, numel).to(grad_dtype)
            out = torch.zeros(numel, dtype=torch.bfloat16)
            for _ in range(2):
                optimizer.step_tensor(p, grad, optimizer.param_groups[0], grad_scale=scale, lowp_out=out)
            assert torch.equal(out, p.detach().bfloat16()) or p_dtype == torch.bfloat16
            results.append(p.detach().float())
    # LAMB's norms are summed in another order, and vector tails may round otherwise.
    bound = 1e-2 if p_dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(results[0], results[1], rtol=bound, atol=bound)


def test_step_tensor_uses_the_given_groups_hyperparameters():
    p, q = make_params(shapes=[(5,), (5,)])
    optimizer = FusedAdam([{"params": [p], "lr": 0.0}, {"params": [q], "lr": 0.5}])
    before = p.detach().clone(), q.detach().clone()
    for x, group in zip((p, q), optimizer.param_groups, strict=True):
        optimizer.step_tensor(x, torch.ones(5), group)
    assert torch.equal(p.detach(), before[0])
    torch.testing.assert_close(q.detach(), before[1] - 0.5)


@pytest.mark.parametrize(
    ("grad", "out", "message"),
    [
        (torch.ones(4), None, "grad has 4 elements but the weights have 5"),
        (torch.ones(5, dtype=torch.int32), None, "grad has dtype torch.int32"),
        (torch.ones(5, device="meta"), torch.zeros(5, dtype=torch.bfloat16), "grad is on meta"),
        (torch.ones(5).to_sparse(), None, "grad has layout torch.sparse_coo"),
        (torch.ones(5), torch.zeros(6, dtype=torch.bfloat16), "lowp_out has 6 elements"),
        (torch.ones(5), torch.zeros(5, 2, dtype=torch.bfloat16)[:, 0], "lowp_out must be contiguous"),
    ],
)
def test_tensors_that_do_not_fit_are_named(grad, out, message):
    (p,) = make_params(shapes=[(5,)])
    optimizer = FusedAdam([p])
    with pytest.raises(ValueError, match=message):
        optimizer.step_tensor(p, grad, optimizer.param_groups[0], lowp_out=out)
    assert not optimizer.state[p]


# --------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("cls", ALL)
def test_state_layout(cls):
    params = make_params(torch.bfloat16)
    optimizer = cls(params)
    set_grads(params, 0)
    params[-1].grad = None
    optimizer.step()
    for p in params[:-1]:
        state = optimizer.state[p]
        assert set(state) == {"step", *cls.state_names}
        assert state["step"].shape == ()
        assert state["step"].dtype == torch.float32
        assert state["step"].item() == 1
        for name in cls.state_names:
            assert state[name].shape == p.shape
            assert state[name].dtype == torch.float32
    assert not optimizer.state.get(params[-1])


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_round_trip_continues_bit_for_bit(cls, dtype):
    def steps(params, optimizer, start, stop):
        for t in range(start, stop):
            set_grads(params, t)
            optimizer.step()

    whole = make_params(dtype)
    steps(whole, cls(whole, lr=0.01), 0, 5)
    params = make_params(dtype)
    optimizer = cls(params, lr=0.01)
    steps(params, optimizer, 0, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = cls(again, lr=123.0)
    groups, dicts = resumed.param_groups, list(resumed.param_groups)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.param_groups is groups
    assert all(x is y for x, y in zip(resumed.param_groups, dicts, strict=True))
    assert resumed.param_groups[0]["lr"] == 0.01
    steps(again, resumed, 3, 5)
    assert all(torch.equal(p, q) for p, q in zip(whole, again, strict=True))


def test_state_of_torchs_adamw_loads():
    theirs = make_params()
    source = torch.optim.AdamW(theirs, lr=0.02, weight_decay=0.1)
    set_grads(theirs, 0)
    source.step()
    ours = [torch.nn.Parameter(p.detach().clone()) for p in theirs]
    optimizer = FusedAdam(ours)
    optimizer.load_state_dict(copy.deepcopy(source.state_dict()))
    set_grads(theirs, 1)
    set_grads(ours, 1)
    source.step()
    optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_loaded_state_is_a_copy():
    params = make_params(torch.bfloat16)
    optimizer = FusedAdam(params)
    set_grads(params, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    other = FusedAdam([torch.nn.Parameter(p.detach().clone()) for p in params])
    other.load_state_dict(saved)
    kept = saved["state"][0]["exp_avg"].clone()
    other.param_groups[0]["params"][0].grad = torch.ones(7, dtype=torch.bfloat16)
    other.step()
    assert torch.equal(saved["state"][0]["exp_avg"], kept)
    assert saved["state"][0]["step"].item() == 1


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_keep_their_modes(clone):
    params = make_params()
    optimizer = clone(DeepSpeedCPUAdam(params, adamw_mode=False, fp32_optimizer_states=False))
    assert (optimizer.adam_w_mode, optimizer.fp32_optimizer_states) == (False, False)
    lamb = clone(FusedLamb(params, eps_inside_sqrt=True, max_grad_norm=2.0, set_grad_none=False))
    assert (lamb.eps_inside_sqrt, lamb.max_grad_norm, lamb.set_grad_none) == (True, 2.0, False)
    held = lamb.param_groups[0]["params"]
    set_grads(held, 0)
    lamb.step()
    assert len(lamb.get_lamb_coeffs()) == len([p for p in held if p.numel()])


# -------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize(
    ("cls", "torch_cls"),
    [
        (DeepSpeedCPUAdam, torch.optim.AdamW),
        (DeepSpeedCPUAdagrad, torch.optim.Adagrad),
        (DeepSpeedCPULion, torch.optim.AdamW),
    ],
)
def test_groups_of_a_torch_optimizer_stay_live(cls, torch_cls):
    params = make_params(shapes=[(4,), (5,)])
    source = torch_cls([{"params": params[:1], "lr": 0.5}, {"params": params[1:]}], lr=0.25, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(source, lambda step: 1.0 / (step + 1))
    dicts = list(source.param_groups)
    optimizer = cls(source.param_groups, lr=0.25, weight_decay=0.01, adamw_mode=False)
    assert all(x is y for x, y in zip(optimizer.param_groups, dicts, strict=True))
    assert optimizer.param_groups[0]["initial_lr"] == 0.5
    assert "foreach" in optimizer.param_groups[0]
    set_grads(params, 0)
    optimizer.step()
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, 0.125]


@pytest.mark.parametrize("cls", ALL)
def test_ordinary_use(cls):
    linear = torch.nn.Linear(4, 2)
    optimizer = cls(linear.parameters())
    assert isinstance(optimizer, torch.optim.Optimizer)

    def closure():
        optimizer.zero_grad()
        loss = linear(torch.ones(3, 4)).square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses[-1] < losses[0]
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))], "lr": 0.5})
    assert [g["lr"] for g in optimizer.param_groups] == [optimizer.defaults["lr"], 0.5]


@pytest.mark.parametrize("cls", [FusedAdam, FusedLion, FusedLamb])
@pytest.mark.parametrize("none", [True, False])
def test_set_grad_none(cls, none):
    (p,) = make_params(shapes=[(3,)])
    optimizer = cls([p], set_grad_none=none)
    for asked, expected in ((None, none), (True, True), (False, False)):
        p.grad = torch.ones(3)
        optimizer.zero_grad() if asked is None else optimizer.zero_grad(set_to_none=asked)
        assert (p.grad is None) == expected
        assert p.grad is None or not p.grad.any()


@pytest.mark.parametrize("cls", [FusedAdam, DeepSpeedCPUAdam, FusedLamb, DeepSpeedCPUAdagrad])
def test_amsgrad_is_refused(cls):
    with pytest.raises(ConfigError, match="amsgrad=True"):
        cls(make_params(), amsgrad=True)
    with pytest.raises(ConfigError, match="amsgrad=True"):
        cls([{"params": make_params(), "amsgrad": True}])


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"lr": -1.0}, "lr must be a number >= 0, but is -1.0"),
        ({"lr": "1e-3"}, "lr must be a number"),
        ({"lr": math.nan}, "lr must be"),
        ({"eps": -1e-8}, "eps must be"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
        ({"betas": 0.9}, "betas must be two numbers"),
    ],
)
def test_hyperparameters_out_of_range(kw, message):
    with pytest.raises(ConfigError, match=message):
        FusedAdam(make_params(), **kw)


# ------------------------------------------------------------------------------------------------------ registry


@pytest.mark.parametrize(
    ("name", "params", "offload", "cls"),
    [
        ("Adam", {}, False, FusedAdam),
        ("ADAMW", {}, False, FusedAdam),
        ("AdamW", {"betas": [0.8, 0.9], "torch_adam": False}, True, DeepSpeedCPUAdam),
        ("adam", {"torch_adam": True}, False, torch.optim.AdamW),
        ("adam", {"torch_adam": True, "adam_w_mode": False}, True, torch.optim.Adam),
        ("AdamW", {"torch_adam": True, "adam_w_mode": False}, False, torch.optim.AdamW),
        ("Adagrad", {}, False, DeepSpeedCPUAdagrad),
        ("Lion", {}, False, FusedLion),
        ("lion", {}, True, DeepSpeedCPULion),
        ("Lamb", {"max_coeff": 0.3, "min_coeff": 0.02}, False, FusedLamb),
        ("SGD", {"momentum": 0.9}, False, torch.optim.SGD),
        ("rmsprop", {}, False, torch.optim.RMSprop),
        ("NAdam", {}, False, torch.optim.NAdam),
    ],
)
def test_build_by_name(name, params, offload, cls):
    group = {"params": make_params(), "weight_decay": 0.5}
    given_params = {"lr": 0.125, **params}
    kept = copy.deepcopy(given_params)
    optimizer = build_optimizer(name, given_params, [group], use_cpu_offload=offload)
    assert type(optimizer) is cls
    assert given_params == kept
    assert optimizer.param_groups[0] is group
    assert (group["lr"], group["weight_decay"]) == (0.125, 0.5)


@pytest.mark.parametrize("offload", [False, True])
def test_adam_mode_of_the_config(offload):
    for name, params, decoupled in (
        ("Adam", {}, True),
        ("Adam", {"adam_w_mode": False}, False),
        ("AdamW", {"adam_w_mode": False}, True),
    ):
        assert build_optimizer(name, params, make_params(), use_cpu_offload=offload).adam_w_mode is decoupled


def test_auto_and_missing_params_leave_the_defaults():
    group = build_optimizer("AdamW", {"lr": "auto", "betas": "auto", "eps": 1e-6}, make_params()).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.9, 0.999), 1e-6)
    assert build_optimizer("Adam", None, make_params()).param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("name", ["OneBitAdam", "onebitlamb", "ZeroOneAdam", "MuAdam", "muadamw", "MuSGD", "Muon"])
def test_documented_but_missing(name):
    with pytest.raises(MissingFeatureError, match=name):
        build_optimizer(name, {}, make_params())


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("AdmaW", {}, "optimizer.type 'AdmaW' is unknown; did you mean AdamW"),
        ("Optimizer", {}, "'Optimizer' is unknown"),
        (None, {}, "optimizer.type must be a string"),
        ("LBFGS", {}, "closure"),
        ("Adam", {"learning_rate": 1}, "optimizer.params.learning_rate: Adam has no such argument.*lr"),
        ("Adam", {"beta": [0.9, 0.9]}, "did you mean betas"),
        ("Adam", {"params": []}, "optimizer.params.params"),
        ("Adam", {"torch_adam": "yes"}, "torch_adam must be true or false"),
        ("Adam", {"lr": "fast"}, "rejects its settings: .*lr must be a number"),
        ("SGD", {"lr": "fast"}, "optimizer SGD rejects its settings"),
        ("SGD", {"lr": -1}, "optimizer SGD rejects its settings"),
        ("Adam", [1], "optimizer.params must be a dict"),
        ("Adam", {"amsgrad": True}, "amsgrad=True"),
    ],
)
def test_bad_configs_are_named(name, params, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(name, params, make_params())


def test_max_grad_norm_of_the_optimizer_params():
    assert take_max_grad_norm({"lr": 1, "max_grad_norm": 0.5}, fp16=True) == ({"lr": 1}, 0.5)
    assert take_max_grad_norm({"lr": 1, "max_grad_norm": 0.5}, fp16=False) == ({"lr": 1}, None)
    assert take_max_grad_norm({"max_grad_norm": 0}, fp16=True) == ({}, None)
    assert take_max_grad_norm({"lr": 1}, fp16=True) == ({"lr": 1}, None)
    with pytest.raises(ConfigError, match="max_grad_norm must be"):
        take_max_grad_norm({"max_grad_norm": "x"}, fp16=True)
    assert type(build_optimizer("Adam", {"max_grad_norm": 1.0}, make_params())) is FusedAdam


def test_zero_tested():
    params = make_params()
    assert all(is_zero_tested(cls(params)) for cls in ALL)
    assert is_zero_tested(torch.optim.Adam(params))
    assert is_zero_tested(torch.optim.AdamW(params, fused=True))
    assert not is_zero_tested(torch.optim.SGD(params, lr=0.1))
    assert not is_zero_tested(torch.optim.Adafactor(params))

    class Changed(torch.optim.AdamW):
        pass

    assert not is_zero_tested(Changed(params))


def test_compatible_ops():
    assert __compatible_ops__["cpu_adam"] is True
    assert __compatible_ops__[AsyncIOBuilder.NAME] is AsyncIOBuilder().is_compatible()


# ------------------------------------------------------------------------------------------------- compiled loop


@pytest.fixture
def native_everywhere(monkeypatch):
    """The compiled loop for tensors of every size."""
    monkeypatch.setattr(native, "MIN_NUMEL", 1)
    monkeypatch.setattr(kernels, "CPU_TILE_NUMEL", 100)
    p = torch.zeros(3)
    if not native.takes(p, p, (p, p), None):
        pytest.skip("no C compiler here")


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_out", [True, False])
@pytest.mark.parametrize("numel", [1, 17, 5000])
def test_compiled_loop_is_the_tiled_update(
    native_everywhere, monkeypatch, decoupled, bias_correction, grad_dtype, with_out, numel
):
    h = {"lr": 0.01, "weight_decay": 0.1, "adam_w_mode": decoupled, "bias_correction": bias_correction}
    results = []
    for switch in ("1", "0"):
        monkeypatch.setenv("DS_NATIVE_STEP", switch)
        (p,) = make_params(shapes=[(numel,)])
        optimizer = FusedAdam([p], **h)
        for t in range(4):
            set_grads([p], t)
            (out,) = step_flat(
                optimizer, grad_dtype=grad_dtype, scale=0.5, out_dtype=torch.bfloat16 if with_out else None
            )
        if with_out:
            assert torch.equal(out, p.detach().bfloat16())
        results.append((p.detach(), *(optimizer.state[p][name] for name in optimizer.state_names)))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("numel", [1, 1024, 1025, 10_000])
def test_parts_of_threads_cover_everything_once(threads, numel):
    seen = torch.zeros(numel, dtype=torch.int32)

    def part(start, stop):
        seen[start:stop] += 1

    native._in_parts(part, numel, threads)
    assert bool((seen == 1).all())


def test_compiled_loop_rounds_special_values_as_torch_does(native_everywhere):
    values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8])
    p, out = torch.nn.Parameter(values.clone()), torch.zeros(9, dtype=torch.bfloat16)
    optimizer = FusedAdam([p], lr=0.0)
    optimizer.step_tensor(p, torch.zeros(9), optimizer.param_groups[0], lowp_out=out)
    torch.testing.assert_close(out, values.bfloat16(), equal_nan=True, rtol=0, atol=0)


def test_a_compiler_that_fails_leaves_the_tiles(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "MIN_NUMEL", 1)
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    native._build.cache_clear()
    try:
        p = torch.zeros(3)
        assert not native.takes(p, p, (p, p), None)
    finally:
        native._build.cache_clear()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [FusedAdam, DeepSpeedCPUAdam, DeepSpeedCPULion, DeepSpeedCPUAdagrad])
@pytest.mark.parametrize("grad_scale", [1.0, 0.5])
def test_many_tensors_at_once_are_as_one_after_the_other(kind: Any, grad_scale: float) -> None:
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(shape, generator=generator) for shape in ((5,), (3, 4), (), (7,), (0,))]
    grads = [torch.randn(value.shape, generator=generator) for value in values]
    grads[3] = grads[3].to(torch.bfloat16)  # not one for a fused call
    results = []
    for together in (True, False):
        params = [torch.nn.Parameter(value.clone()) for value in values]
        optimizer = kind(params, lr=0.1)
        group = optimizer.param_groups[0]
        for _ in range(3):
            if together:
                optimizer.step_tensors(params, [grad.clone() for grad in grads], group, grad_scale=grad_scale)
            else:
                for param, grad in zip(params, grads, strict=True):
                    optimizer.step_tensor(param, grad.clone(), group, grad_scale=grad_scale)
        results.append([param.detach() for param in params])
        assert all(float(optimizer.state[param]["step"]) == 3 for param in params)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
