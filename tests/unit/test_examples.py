"""The example's data and model: what `make demo` relies on, checked without training."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture()
def gpt(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import gpt

    yield gpt
    del sys.modules["gpt"]


def test_samples_do_not_depend_on_the_number_of_ranks(gpt):
    text = torch.arange(251, dtype=torch.uint8).repeat(20)
    whole = gpt.windows(text, 40, 8, 16)
    ranks = [gpt.windows(text, 40 + 2 * rank, 2, 16) for rank in range(4)]
    for i in (0, 1):
        torch.testing.assert_close(torch.cat([r[i] for r in ranks]), whole[i], rtol=0, atol=0)


def test_a_window_predicts_the_next_byte_and_samples_spread_over_the_text(gpt):
    text = torch.arange(10_000)  # each element says where it lies
    x, y = gpt.windows(text, 0, 500, 16)
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (500, 16)
    torch.testing.assert_close(y, x + 1, rtol=0, atol=0)
    assert x[:, 0].unique().numel() == 500
    assert torch.histc(x[:, 0].float(), bins=10, min=0, max=len(text)).min() >= 45


def test_samples_far_into_a_long_run_are_still_all_different(gpt):
    x, _ = gpt.windows(torch.arange(9_000_000), 10**8, 1000, 16)
    assert x[:, 0].unique().numel() == 1000


def test_validation_files_are_held_out(gpt):
    train, validation = gpt.stdlib_text()
    assert train.dtype == validation.dtype == torch.uint8
    assert len(train) > 3_000_000 and 100_000 < len(validation) < len(train) / 8
    again, _ = gpt.stdlib_text()
    assert torch.equal(train, again)
    probe = bytes(validation[:4000].tolist())
    assert probe not in bytes(train.numpy())


def test_the_model_has_three_million_parameters_and_a_tied_head(gpt):
    model = gpt.GPT()
    assert 3_000_000 < sum(p.numel() for p in model.parameters()) < 3_500_000
    assert model.head.weight is model.tokens.weight


def test_the_model_looks_at_no_later_byte(gpt):
    torch.manual_seed(0)
    model = gpt.GPT(layers=2, width=64, context=16)
    x = torch.randint(256, (1, 16))
    changed = x.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 256
    with torch.no_grad():
        same = model(x)[0] == model(changed)[0]
    assert same[:9].all()
    assert not same[9].all()


def test_loss_is_float32_in_nats_and_the_same_on_any_dtype(gpt):
    torch.manual_seed(0)
    model = gpt.GPT(layers=1, width=64, context=16)
    x, y = gpt.windows(torch.arange(251, dtype=torch.uint8).repeat(4), 0, 4, 16)
    loss = model(x, y)
    assert loss.item() == pytest.approx(torch.tensor(256.0).log().item(), abs=0.5)
    half = model.to(torch.bfloat16)(x, y)
    assert loss.dtype == half.dtype == torch.float32
    assert half.item() == pytest.approx(loss.item(), abs=0.05)


def test_sampling_gives_the_same_text_twice(gpt):
    torch.manual_seed(0)
    model = gpt.GPT(layers=1, width=64, context=16)
    text = gpt.sample(model, "def ", 20, 16)
    assert text.startswith("def ") and len(text) > 4
    assert text == gpt.sample(model, "def ", 20, 16)
