"""The Q-Former and its three losses (paper §3.1, §3.2) in plain PyTorch: the specification of ``blip2.model``.

Rows are dense and padded, each objective is a pass of its own, and nothing is packed, shared or cached. Parameters have
the names of ``RepresentationModel``, so that the two exchange state dicts.

Legend: B batch, Q queries, T text tokens, S = Q + T, P image tokens, D width of the Q-Former, E width of the images.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def attention_mask(kind: str, num_queries: int, text_mask: Tensor) -> Tensor:
    """Return [B, S, S] for rows of [queries; text], True where a row may attend to a column (Figure 2, right)."""
    num_rows, length = text_mask.shape
    mask = torch.empty(num_rows, num_queries + length, num_queries + length, dtype=torch.bool)
    for i in range(num_queries + length):
        for j in range(num_queries + length):
            if i < num_queries and j < num_queries:
                allowed = True  # queries attend to each other under every mask
            elif i < num_queries:
                allowed = kind == "bidirectional"  # queries to text
            elif j < num_queries:
                allowed = kind != "unimodal"  # text to queries
            else:
                allowed = kind != "causal" or j <= i  # text to text
            mask[:, i, j] = allowed and (j < num_queries or text_mask[:, j - num_queries])
    return mask


class Attention(nn.Module):
    """Multi-head attention, residual and LayerNorm: LN(x + O softmax(Q K^T / sqrt(d)) V)."""

    def __init__(self, width: int, source_width: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.output = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = nn.Linear(source_width, width), nn.Linear(source_width, width)
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, tokens, d]
            for projected in (self.query(x), self.key(source), self.value(source))
        )
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -math.inf)
        out = scores.softmax(dim=-1) @ v
        return self.norm(x + self.output(out.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """LN(x + W2 gelu(W1 x))."""

    def __init__(self, width: int, intermediate_size: int, eps: float) -> None:
        super().__init__()
        self.expand, self.contract = nn.Linear(width, intermediate_size), nn.Linear(intermediate_size, width)
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.contract(F.gelu(self.expand(x))))


class Block(nn.Module):
    """One block of Figure 2 (left)."""

    def __init__(self, config, image_width: int, has_cross_attention: bool) -> None:
        super().__init__()
        width, heads, eps = config.hidden_size, config.num_attention_heads, config.layer_norm_eps
        self.self_attention = Attention(width, width, heads, eps)
        self.cross_attention = Attention(width, image_width, heads, eps) if has_cross_attention else None
        self.query_feed_forward = FeedForward(width, config.intermediate_size, eps)
        self.text_feed_forward = FeedForward(width, config.intermediate_size, eps)

    def forward(self, queries: Tensor, text: Tensor, mask: Tensor, images: Tensor | None) -> tuple[Tensor, Tensor]:
        both = torch.cat([queries, text], dim=1)
        both = self.self_attention(both, both, mask)
        queries, text = both[:, : queries.shape[1]], both[:, queries.shape[1] :]
        if self.cross_attention is not None and images is not None:
            queries = self.cross_attention(queries, images)
        return self.query_feed_forward(queries), self.text_feed_forward(text)


class QFormer(nn.Module):
    def __init__(self, config, image_width: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.queries = nn.Parameter(torch.empty(1, config.num_query_tokens, width))
        self.word_embedding = nn.Embedding(config.vocab_size, width)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, width)
        self.embedding_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.blocks = nn.ModuleList(
            Block(config, image_width, i % config.cross_attention_frequency == 0)
            for i in range(config.num_hidden_layers)
        )

    def forward(self, kind: str, images: Tensor | None, ids: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs of queries [B, Q, D] and text [B, T, D].

        Args:
            images: normalized features [B, P, E]; None runs the text alone.
            ids: [B, T]; T may be 0.
        """
        text = self.word_embedding(ids) + self.position_embedding(torch.arange(ids.shape[1]))
        queries = self.queries.expand(len(ids), -1, -1)
        if images is None:
            queries = queries[:, :0]
        mask = attention_mask(kind, queries.shape[1], text_mask)
        queries, text = self.embedding_norm(queries), self.embedding_norm(text)
        for block in self.blocks:
            queries, text = block(queries, text, mask, images)
        return queries, text


class LanguageHead(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))


class ReferenceModel(nn.Module):
    """The Q-Former, the LayerNorm of the image features, and the three heads of stage 1."""

    def __init__(self, config, image_width: int) -> None:
        super().__init__()
        self.image_norm = nn.LayerNorm(image_width, eps=config.image_norm_eps)
        self.qformer = QFormer(config, image_width)
        self.image_projection = nn.Linear(config.hidden_size, config.image_text_hidden_size)
        self.text_projection = nn.Linear(config.hidden_size, config.image_text_hidden_size)
        self.matching_head = nn.Linear(config.hidden_size, 2)
        self.language_head = LanguageHead(config)
        self.temperature = nn.Parameter(torch.tensor(0.07))

    def itc(self, images: Tensor, ids: Tensor, text_mask: Tensor, positive: Tensor, smoothing: float = 0.1) -> Tensor:
        """Contrast images with texts in both directions; the pairs of a row of `positive` [B, B] share the target."""
        z, _ = self.qformer("unimodal", self.image_norm(images), ids[:, :0], text_mask[:, :0])
        _, text = self.qformer("unimodal", None, ids, text_mask)
        image = F.normalize(self.image_projection(z), dim=-1)  # [B, Q, C]
        cls = F.normalize(self.text_projection(text[:, 0]), dim=-1)  # [B, C]
        similarity = torch.einsum("iqc,tc->itq", image, cls).amax(dim=2) / self.temperature  # the best query's
        target = positive / positive.sum(dim=1, keepdim=True)
        target = (1 - smoothing) * target + smoothing / len(ids)
        return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2

    def itm(self, images: Tensor, ids: Tensor, text_mask: Tensor, wrong_images: Tensor, wrong_texts: Tensor) -> Tensor:
        """Tell the B pairs from each image with a wrong text and each text with a wrong image (indices [B])."""
        pair = torch.arange(len(ids))
        image, text = torch.cat([pair, pair, wrong_images]), torch.cat([pair, wrong_texts, pair])
        z, _ = self.qformer("bidirectional", self.image_norm(images[image]), ids[text], text_mask[text])
        logits = self.matching_head(z).mean(dim=1)  # the average over the queries
        return F.cross_entropy(logits, torch.cat([torch.ones_like(pair), torch.zeros_like(torch.cat([pair, pair]))]))

    def itg(self, images: Tensor, ids: Tensor, text_mask: Tensor, smoothing: float = 0.1) -> Tensor:
        """Predict each token from the image and the tokens before it; [DEC], the last id, replaces [CLS]."""
        vocabulary = self.qformer.word_embedding.weight
        inputs = ids.clone()
        inputs[:, 0] = len(vocabulary) - 1
        _, text = self.qformer("causal", self.image_norm(images), inputs, text_mask)
        head = self.language_head
        logits = head.norm(F.gelu(head.transform(text))) @ vocabulary.T + head.bias
        labels = ids.where(text_mask, -100)[:, 1:]
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), label_smoothing=smoothing)
