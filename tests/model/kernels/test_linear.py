"""Linear layers by oneDNN: the same results, and where they are used."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from blip2.model.kernels import linear as module
from blip2.model.kernels.linear import Linear, convert_linears, linear, linear_gelu, mlp

LARGE = (96, 512, 384)
"""Rows, inputs, outputs: enough multiplications."""
needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or "AVX512" not in torch.backends.cpu.get_cpu_capability(),
    reason="oneDNN is asked for on processors with AVX-512 alone",
)


def sides(rows: int, inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs))
    return tuple(torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)


@pytest.mark.parametrize("size", [LARGE, (3, 8, 5)], ids=["large", "small"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_it_gives_what_torch_gives(size: tuple[int, int, int], with_bias: bool) -> None:
    x, weight, bias, above = sides(*size)
    given = [x, weight] + [bias] * with_bias
    wanted, found = F.linear(*given), linear(*given)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    for mine, theirs in zip(
        torch.autograd.grad(found, given, above), torch.autograd.grad(wanted, given, above), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)
    with torch.no_grad():  # as in a backward pass
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [LARGE, (3, 8, 5)], ids=["large", "small"])
def test_gelu_behind_it(size: tuple[int, int, int]) -> None:
    x, weight, bias, above = sides(*size)
    wanted = F.gelu(F.linear(x, weight, bias))
    with torch.no_grad():
        torch.testing.assert_close(linear_gelu(x, weight, bias), wanted, rtol=1e-5, atol=1e-4)
    found = linear_gelu(x, weight, bias)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    for mine, theirs in zip(
        torch.autograd.grad(found, [x, weight, bias], above), torch.autograd.grad(wanted, [x, weight, bias], above),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=5e-4)


@pytest.mark.parametrize("size", [LARGE, (3, 8, 5)], ids=["large", "small"])
@pytest.mark.parametrize("groups", [1, 3])
def test_mlp(size: tuple[int, int, int], groups: int) -> None:
    rows, width, hidden = size
    x, fc1, fc2 = torch.randn(rows, width, requires_grad=True), Linear(width, hidden), Linear(hidden, width)
    shaped, inputs = x.unflatten(0, (groups, -1)), [x, *fc1.parameters(), *fc2.parameters()]
    expected, found = fc2(F.gelu(fc1(x))).view_as(shaped), mlp(shaped, fc1, fc2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        torch.autograd.grad(found.sin().sum(), inputs), torch.autograd.grad(expected.sin().sum(), inputs),
        rtol=1e-4, atol=5e-4,
    )  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(mlp(shaped, fc1, fc2), expected, rtol=1e-5, atol=1e-4)


def test_mlp_does_not_store_the_activation() -> None:
    x, fc1, fc2 = torch.randn(10, 8), Linear(8, 32), Linear(32, 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        mlp(x, fc1, fc2)
    assert kept.count(torch.Size([10, 32])) == 1  # the input of the GELU, not its output


@needs_onednn
def test_rows_of_rows_and_parts_of_rows() -> None:
    x, weight, bias, _ = sides(*LARGE)
    wide = torch.cat([x, x], dim=1)[:, : x.shape[1]]  # not contiguous
    for shaped in (x.unflatten(0, (4, 24)), x.unflatten(0, (4, 24)).transpose(0, 1), wide):
        out = linear(shaped, weight, bias)
        assert uses_onednn(out)
        torch.testing.assert_close(out, F.linear(shaped, weight, bias), rtol=1e-5, atol=1e-4)
        (mine,) = torch.autograd.grad(out.square().sum(), [x], retain_graph=True)
        (theirs,) = torch.autograd.grad(F.linear(shaped, weight, bias).square().sum(), [x], retain_graph=True)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-2)


def uses_onednn(out: torch.Tensor) -> bool:
    return "_OneDNNLinear" in type(out.grad_fn).__name__


@needs_onednn
def test_it_is_used_where_it_pays_and_nowhere_else() -> None:
    x, weight, bias, _ = sides(*LARGE)
    assert uses_onednn(linear(x, weight, bias))
    assert not uses_onednn(linear(x[:1], weight, bias))
    assert not uses_onednn(linear(x.double(), weight.double(), bias.double()))
    assert not uses_onednn(linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()))
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(x, weight, bias)
    assert out.dtype == torch.bfloat16 and not uses_onednn(out)


@needs_onednn
def test_a_frozen_weight_keeps_nothing_of_what_goes_in() -> None:
    x, weight, bias, above = sides(*LARGE)
    out = linear(x, weight.detach(), bias.detach())
    kept = [t for t in out.grad_fn.saved_tensors if t is not None]  # pyright: ignore[reportOptionalMemberAccess]
    assert [t.shape for t in kept] == [weight.shape]
    (found,) = torch.autograd.grad(out, [x], above)
    torch.testing.assert_close(found, above @ weight, rtol=1e-5, atol=1e-4)


def test_networks_of_others_get_it_without_a_change_of_weights() -> None:
    class Own(nn.Linear):
        """What others made of a linear layer stays theirs."""

    network = nn.Sequential(nn.Linear(512, 384), Own(384, 512), nn.LayerNorm(512))
    x = torch.randn(96, 512)
    before, state = network(x), {name: t.clone() for name, t in network.state_dict().items()}
    convert_linears(network)
    assert [type(layer) for layer in network] == [Linear, Own, nn.LayerNorm]
    torch.testing.assert_close(network(x), before, rtol=1e-5, atol=1e-4)
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in state.items())


def test_without_onednn_it_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_onednn", None)
    x, weight, bias, _ = sides(*LARGE)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    with torch.no_grad():
        assert torch.equal(linear(x, weight), F.linear(x, weight))
