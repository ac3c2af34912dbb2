"""Text without padding: the same tokens as in dense rows."""

import pytest
import torch

from blip2.model.kernels.packing import PackedTokens

N, Q, T, D = 3, 2, 4, 5
TEXT = torch.arange(T) < torch.tensor([[4], [1], [3]])
QUERIES, WORDS = torch.randn(N, Q, D), torch.randn(N, T, D)


def dense(queries: torch.Tensor | None, text: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor:
    """Return [queries; text] with zeros for padding."""
    parts = [queries] if queries is not None else []
    return torch.cat([*parts, text * mask[..., None]] if text is not None else parts, dim=1)


@pytest.mark.parametrize(("with_queries", "with_text"), [(True, True), (True, False), (False, True)])
def test_padding_and_its_inverse(with_queries: bool, with_text: bool) -> None:
    queries, words = QUERIES if with_queries else None, WORDS if with_text else None
    tokens = PackedTokens.from_mask(N, Q if with_queries else 0, TEXT if with_text else None)
    x = tokens.cat(queries, words[TEXT] if words is not None else None)
    assert len(x) == N * Q * with_queries + int(TEXT.sum()) * with_text
    assert torch.equal(tokens.pad(x), dense(queries, words, TEXT))
    assert torch.equal(tokens.unpad(tokens.pad(x)), x)
    for part, expected in zip(tokens.split(x), (queries, words[TEXT] if words is not None else None), strict=True):
        assert (part is None) == (expected is None) and (part is None or torch.equal(part, expected))


@pytest.mark.parametrize("text", [TEXT, None])
def test_one_row_of_queries_stands_for_all(text: torch.Tensor | None) -> None:
    tokens = PackedTokens.from_mask(N, Q, text)
    words = None if text is None else WORDS[text]
    one, all_rows = tokens.cat(QUERIES[:1], words), tokens.cat(QUERIES[:1].expand(N, -1, -1), words)
    assert torch.equal(tokens.expand_queries(one), all_rows)
    assert torch.equal(tokens.expand_queries(all_rows), all_rows)
    assert torch.equal(tokens.pad(one), tokens.pad(all_rows))
    assert torch.equal(tokens.split(one)[0], QUERIES[:1])


def test_a_selection_has_all_queries_and_some_text() -> None:
    tokens = PackedTokens.from_mask(N, Q, TEXT)
    x = tokens.cat(QUERIES, WORDS[TEXT])
    some = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()  # one of them is padding
    kept = tokens.select(some)
    assert torch.equal(kept.pad(x[kept.kept_indices]), dense(QUERIES, WORDS, some & TEXT))
    none = tokens.select(False)
    assert torch.equal(none.pad(x[none.kept_indices]), QUERIES)
    assert tokens.select(True) is tokens


def test_gradients_are_those_of_dense_rows() -> None:
    queries, words, weight = (torch.randn(s, requires_grad=True) for s in ((1, Q, D), (N, T, D), (N, Q + T, D)))
    tokens = PackedTokens.from_mask(N, Q, TEXT)
    found = (tokens.pad(tokens.cat(queries, words[TEXT])) * weight).sin().sum()
    expected = (dense(queries.expand(N, -1, -1), words, TEXT) * weight).sin().sum()
    inputs = (queries, words, weight)
    torch.testing.assert_close(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs))
