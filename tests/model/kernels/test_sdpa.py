"""Attention and dropout: the results of the plain formulas."""

import math

import pytest
import torch
from torch.nn import functional as F

from blip2.model.kernels import sdpa as module
from blip2.model.kernels.dropout import Dropout, dropout
from blip2.model.kernels.sdpa import merge_heads, sdpa, sdpa_shared_kv, split_heads

MASK = torch.tensor([[[1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]]).bool()[None]  # [1, 1, 3, 5]


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    return (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(dim=-1) @ value


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    """Return query, key and value for two rows of three heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 3, 4), (2, 3, 5, 4), (2, 3, 5, 4))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("mask", [None, MASK.expand(2, -1, -1, -1)], ids=["whole", "masked"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_values_and_gradients(mask, dtype, tolerance) -> None:
    qkv = inputs(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in qkv]
    found, expected = sdpa(*qkv, mask, 0.0), plain(*exact, mask)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    for a, b in zip(torch.autograd.grad(found.sum(), qkv), torch.autograd.grad(expected.sum(), exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2 * tolerance, atol=2 * tolerance)


def test_the_way_with_dropout_agrees_too(monkeypatch) -> None:
    monkeypatch.setattr(module, "dropout", lambda x, p: x)
    qkv = inputs(torch.float32)
    torch.testing.assert_close(sdpa(*qkv, MASK.expand(2, -1, -1, -1), 0.5), plain(*qkv, MASK))


@pytest.mark.parametrize("row_to_image", [1, 3, [2, 0, 0, 1, 2], [1], [0, 0, 0]], ids=str)
def test_rows_that_share_keys_and_values(row_to_image: int | list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(3, 2, 5, 4, generator=generator, requires_grad=True) for _ in range(2))
    image = torch.arange(3).repeat(row_to_image) if isinstance(row_to_image, int) else torch.tensor(row_to_image)
    query = torch.randn(len(image), 6, 8, generator=generator, requires_grad=True)
    shared = sdpa_shared_kv(query, key, value, row_to_image if isinstance(row_to_image, int) else image, 0.0)
    copied = merge_heads(plain(split_heads(query, 2), key[image], value[image], None))
    torch.testing.assert_close(shared, copied)
    tensors = (query, key, value)
    torch.testing.assert_close(
        torch.autograd.grad(shared.sin().sum(), tensors), torch.autograd.grad(copied.sin().sum(), tensors)
    )


def test_dropout() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 100).abs() + 0.1
    out = dropout(x, 0.3)
    dropped = out == 0
    torch.testing.assert_close(out[~dropped], x[~dropped] / 0.7)
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.01)
    torch.testing.assert_close(out.mean(), F.dropout(x, 0.3).mean(), rtol=0.02, atol=0)
    layer = Dropout(0.3)
    assert (layer.active_p, layer.eval().active_p) == (0.3, 0.0)
    assert layer(x) is x


def test_dropout_stores_one_byte_per_element() -> None:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.element_size() * t.numel()) or t, lambda t: t
    ):
        dropout(torch.randn(50, 40, requires_grad=True), 0.1)
    assert sum(kept) <= 50 * 40 + 16
