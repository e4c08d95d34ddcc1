"""The global gradient norm: exact for large tensors, non-finite when an element is."""

from __future__ import annotations

import math

import pytest
import torch

from deepspeed._core.precision.norm import clip_factor, squared_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("numel", [1, 4095, 4096, 3 * 4096 + 5, (1 << 18) + 7])
def test_it_is_that_of_double_precision(dtype: torch.dtype, numel: int) -> None:
    tensor = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)
    exact = float(tensor.double().square().sum())
    assert float(squared_norm([tensor])) == pytest.approx(exact, rel=1e-5)


def test_many_elements_do_not_swamp_the_sum() -> None:
    # One fp32 sum of this is off by some 1e-4.
    tensor = torch.full((8_000_001,), 0.1)
    assert float(squared_norm([tensor])) == pytest.approx(8_000_001 * float(torch.tensor(0.1)) ** 2, rel=1e-5)


def test_tensors_add_up_whatever_their_shapes_and_strides() -> None:
    tensors = [torch.ones(3, 5), torch.ones(4, 6).t(), torch.ones(0), torch.ones(()), torch.ones(10)[::2]]
    assert float(squared_norm(tensors)) == pytest.approx(15 + 24 + 1 + 5, rel=1e-6)
    assert squared_norm([]).dtype == torch.float64 and float(squared_norm([])) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 5000, -1])
def test_one_element_that_is_not_finite_shows(dtype: torch.dtype, bad: float, place: int) -> None:
    tensor = torch.zeros((1 << 18) + 9, dtype=dtype)
    tensor[place] = bad
    assert not math.isfinite(float(squared_norm([torch.ones(7), tensor])))


def test_clip_factor() -> None:
    assert clip_factor(4.0, 0.0) == 1.0 and clip_factor(math.inf, 1.0) == 1.0 and clip_factor(0.5, 1.0) == 1.0
    assert clip_factor(4.0, 1.0) == pytest.approx(0.25, rel=1e-6)
