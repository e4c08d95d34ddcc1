"""Block-wise quantisation: bounds, bytes, what is not finite, error feedback. No process."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed._core.quant.blocks import INT4, INT8, BlockFormat
from deepspeed._core.quant.loco import ErrorFeedback

FORMATS = [INT8, INT4, BlockFormat(8, 6), BlockFormat(4, 6)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALLEST = 1.5e-36  # what a block may lose if it rounds to zero


def packed_of(form: BlockFormat, source: torch.Tensor) -> torch.Tensor:
    packed = torch.full((*source.shape[:-1], form.packed_nbytes(source.shape[-1])), 0xA5, dtype=torch.uint8)
    form.quantise(source, packed)
    return packed


def round_trip(form: BlockFormat, source: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    out = torch.full_like(source, 77.0, dtype=dtype or source.dtype)
    form.dequantise(packed_of(form, source), out)
    return out


def bounds_of(form: BlockFormat, source: torch.Tensor) -> torch.Tensor:
    """The documented bound for each element of a vector, before the output's rounding."""
    peaks = [block.abs().max().expand(block.numel()) for block in source.double().split(form.block_numel)]
    return (torch.cat(peaks) * form.relative_error).clamp(min=SMALLEST)


def check_bound(form: BlockFormat, source: torch.Tensor, decoded: torch.Tensor) -> None:
    if source.numel():
        rounding = torch.finfo(decoded.dtype).eps * decoded.double().abs() + torch.finfo(decoded.dtype).tiny
        error = (decoded.double() - source.double()).abs()
        assert (error <= bounds_of(form, source) + rounding).all(), (error - bounds_of(form, source)).max()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 300), st.sampled_from(FORMATS), st.sampled_from(DTYPES), st.integers(0, 10**6), st.floats(-4, 4))
def test_every_element_is_within_the_bound(numel, form, dtype, seed, exponent):
    generator = torch.Generator().manual_seed(seed)
    # Magnitudes that differ from block to block, and some blocks of zeros.
    source = torch.randn(numel, generator=generator) * 10**exponent
    source *= torch.rand(numel, generator=generator) ** 3
    source[: numel // 3] = 0
    source = source.to(dtype)
    decoded = round_trip(form, source)
    check_bound(form, source, decoded)
    assert (decoded[: numel // 3 // form.block_numel * form.block_numel] == 0).all()


@pytest.mark.parametrize("form", FORMATS)
def test_the_bound_is_tight(form):
    """A format that lost less would have more bits: the largest error is near half a step."""
    source = torch.rand(form.block_numel * 500) - 0.5
    source[:: form.block_numel] = 1
    error = (round_trip(form, source) - source).abs().double()
    assert (error / bounds_of(form, source)).max() > 0.9


def test_vectors_longer_than_a_chunk():
    source = torch.randn((1 << 18) * 2 + 77) * torch.linspace(0, 5, (1 << 18) * 2 + 77)
    for form in (INT8, INT4):
        check_bound(form, source, round_trip(form, source))
        rows = source[: 3 * 100_001].view(3, 100_001)
        each = torch.stack([round_trip(form, row) for row in rows])
        assert torch.equal(round_trip(form, rows), each)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("numel", [1, 5, 6, 7, 31, 128, 129])
def test_rows_are_packed_one_by_one_from_any_stride(form, numel):
    grid = torch.randn(4, 3, numel)
    rows = grid[:, 1]
    packed = packed_of(form, rows)
    for row, one in zip(rows, packed, strict=True):
        assert torch.equal(one, packed_of(form, row.clone())), "the packing depends on how rows lie"
    out = torch.zeros(4, 3, numel)
    form.dequantise(packed, out[:, 2])
    assert torch.equal(out[:, 2], torch.stack([round_trip(form, row) for row in rows]))
    assert not out[:, :2].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS)
def test_accumulate_adds(form, dtype):
    source, before = torch.randn(200), torch.randn(200).to(dtype)
    out = before.clone()
    form.dequantise(packed_of(form, source), out, accumulate=True)
    assert torch.equal(out, (before.float() + round_trip(form, source)).to(dtype))
    assert not torch.equal(out, before)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS)
def test_a_block_with_a_non_finite_value_is_nan_and_no_other(form, dtype, bad):
    source = torch.randn(form.block_numel * 3 + 3).to(dtype)
    for position in (0, form.block_numel + 1, source.numel() - 1):
        spoiled = source.clone()
        spoiled[position] = bad
        decoded = round_trip(form, spoiled)
        low = position // form.block_numel * form.block_numel
        hit = torch.zeros(source.numel(), dtype=torch.bool)
        hit[low : low + form.block_numel] = True
        assert decoded[hit].isnan().all()
        assert torch.equal(decoded[~hit], round_trip(form, source)[~hit])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS)
def test_extreme_finite_values_stay_finite(form, dtype):
    limits = torch.finfo(dtype)
    for value in (limits.max, limits.min, limits.tiny, -limits.tiny, limits.smallest_normal / 2):
        source = torch.tensor([value, value / 2, 0.0] * 50).to(dtype)
        decoded = round_trip(form, source)
        assert decoded.isfinite().all()
        check_bound(form, source, decoded)


def test_packing_again_changes_nothing():
    """Weights that went through the wire once go through it again unchanged (fp32)."""
    for form in (INT8, INT4):
        once = round_trip(form, torch.randn(1000))
        assert torch.equal(round_trip(form, once), once)


def test_bytes():
    assert INT8.packed_nbytes(0) == INT4.packed_nbytes(0) == 0
    assert INT8.packed_nbytes(1) == 4 and INT4.packed_nbytes(1) == 4
    assert INT8.packed_nbytes(129) == 2 * 2 + 130 and INT4.packed_nbytes(33) == 2 * 2 + 18
    for numel in (1000, 10_001, 999_999):
        assert INT8.packed_nbytes(numel) <= 0.27 * 4 * numel
        assert INT8.packed_nbytes(numel) <= 0.53 * 2 * numel
        assert INT4.packed_nbytes(numel) <= 0.15 * 4 * numel
    for form in FORMATS:
        assert all(form.packed_nbytes(numel) % 2 == 0 for numel in range(40))


def test_every_code_is_used():
    source = torch.arange(-7, 8).float().repeat(4)
    packed = packed_of(BlockFormat(4, 60), source)
    codes = torch.cat([packed[2:] & 15, packed[2:] >> 4])
    assert sorted(set(codes.tolist())) == list(range(1, 16))
    source = torch.arange(-127, 128).float()
    codes = packed_of(BlockFormat(8, 256), source)[2:257].view(torch.int8)
    assert sorted(codes.tolist()) == list(range(-127, 128))


def test_mismatches_are_named():
    with pytest.raises(ValueError, match=r"got torch.float32 and torch.uint8 of shape \(9,\)"):
        INT8.quantise(torch.zeros(8), torch.zeros(9, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"floating tensor .* got torch.int64"):
        INT8.dequantise(torch.zeros(10, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(ValueError, match="bits=3"):
        BlockFormat(3, 32)
    with pytest.raises(ValueError, match="block_numel=7"):
        BlockFormat(4, 7)


# -- LoCo ----------------------------------------------------------------------------------------------------------


def accumulated_error(feedback: ErrorFeedback | None, vectors: list[torch.Tensor]) -> torch.Tensor:
    """What the receiver's sum of all vectors is off by."""
    total, exact = torch.zeros_like(vectors[0]), torch.zeros_like(vectors[0])
    for vector in vectors:
        packed = torch.empty(INT4.packed_nbytes(vector.numel()), dtype=torch.uint8)
        if feedback is None:
            INT4.quantise(vector, packed)
        else:
            feedback.quantise("w", INT4, vector, packed)
        INT4.dequantise(packed, total, accumulate=True)
        exact += vector
    return (total - exact).norm()


@pytest.mark.parametrize("err_beta", [0.0, 0.5, 0.8])
def test_feedback_keeps_the_accumulated_error_from_growing(err_beta):
    steady = torch.randn(640)
    short, long = ([steady] * steps for steps in (50, 200))
    plain, loco = accumulated_error(None, long), accumulated_error(ErrorFeedback(err_beta=err_beta), long)
    assert plain > 3.5 * accumulated_error(None, short)
    assert loco < plain / 20
    # A constant: what is left of the average, and a little since that is itself kept in 8 bits.
    assert loco < 1.6 * accumulated_error(ErrorFeedback(err_beta=err_beta), short)
    noisy = [steady + 0.3 * torch.randn(640) for _ in range(100)]
    assert accumulated_error(ErrorFeedback(err_beta=err_beta), noisy) < accumulated_error(None, noisy) / 2


def test_feedback_with_beta_one_learns_nothing():
    vectors = [torch.randn(100)] * 5
    assert accumulated_error(ErrorFeedback(err_beta=1.0), vectors) == accumulated_error(None, vectors)


def sent_by(feedback: ErrorFeedback, vector: torch.Tensor, key: str = "w") -> torch.Tensor:
    packed = torch.empty(INT4.packed_nbytes(vector.numel()), dtype=torch.uint8)
    feedback.quantise(key, INT4, vector, packed)
    out = torch.empty_like(vector, dtype=torch.float32)
    INT4.dequantise(packed, out)
    return out


def test_feedback_is_cleared_every_reset_steps():
    vector = torch.randn(96)
    feedback = ErrorFeedback(err_beta=0.0, reset_T=3)
    sent = [sent_by(feedback, vector) for _ in range(7)]
    assert not torch.equal(sent[0], sent[1])
    assert torch.equal(sent[0], sent[3]) and torch.equal(sent[1], sent[4]) and torch.equal(sent[0], sent[6])
    feedback.clear()
    assert torch.equal(sent_by(feedback, vector), sent[0])


def test_feedback_of_keys_and_shapes_is_apart():
    first, second = torch.randn(64), torch.randn(64)
    feedback = ErrorFeedback(err_beta=0.0)
    sent_by(feedback, first, "a")
    assert torch.equal(sent_by(feedback, second, "b"), sent_by(ErrorFeedback(), second))
    assert torch.equal(sent_by(feedback, second[:33], "a"), sent_by(ErrorFeedback(), second[:33]))
    assert feedback.nbytes == INT8.packed_nbytes(64) + INT8.packed_nbytes(33)


def test_feedback_forgets_what_was_not_finite():
    feedback = ErrorFeedback(err_beta=0.0)
    vector = torch.randn(64)
    spoiled = vector.clone()
    spoiled[3] = float("inf")
    assert sent_by(feedback, spoiled)[:32].isnan().all(), "the receiver must see it"
    after = sent_by(feedback, vector)
    assert after.isfinite().all()
    assert torch.equal(after[:32], sent_by(ErrorFeedback(), vector)[:32])


def test_feedback_takes_16_bit_gradients():
    vectors = [torch.randn(640).bfloat16()] * 40
    exact = torch.stack(vectors).float().sum(0)
    feedback = ErrorFeedback()
    with_it = sum(sent_by(feedback, vector) for vector in vectors)
    without = sum(sent_by(ErrorFeedback(), vector) for vector in vectors)
    assert (with_it - exact).norm() < (without - exact).norm() / 4


def test_feedback_refuses_nonsense():
    with pytest.raises(ValueError, match=r"err_beta=1\.5"):
        ErrorFeedback(err_beta=1.5)
    with pytest.raises(ValueError, match="reset_T=0"):
        ErrorFeedback(reset_T=0)
