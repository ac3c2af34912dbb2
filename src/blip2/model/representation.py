"""Stage 1: vision-language representation learning from a frozen image encoder (paper §3.2).

Legend: B batch of this process, N of all processes, Q queries, T text tokens, P image tokens, D Q-Former width,
E image encoder width, C contrastive width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from blip2.backbones.vision import ImageEncoder
from blip2.config import ObjectivesConfig, QFormerConfig
from blip2.distributed import fetch, gather, gather_padded, process_count, process_index, shared_chances
from blip2.model import losses as objectives
from blip2.model.attention import ImageMemory
from blip2.model.image_memory import encode_images
from blip2.model.kernels.linear import Linear, linear
from blip2.model.losses import Outcome
from blip2.model.qformer import QFormer, attention_mask, contrast_and_generate_mask


class Negatives(NamedTuple):
    """Hard negatives of a batch, as indices into the batch of all processes."""

    image_for_text: Int[Tensor, "B"]
    text_for_image: Int[Tensor, "B"]


@dataclass(frozen=True)
class RepresentationBatch:
    """Image-text pairs for stage 1."""

    images: Shaped[Tensor, "B ..."]
    """Pixels [B, 3, H, W], or features [B, P, E] of the frozen encoder made beforehand."""
    ids: Int[Tensor, "B T"]
    """Text tokens: [CLS] ... [SEP], padded on the right."""
    mask: Bool[Tensor, "B T"]
    """True where a token is real."""
    image_ids: Int[Tensor, "B"]
    """Pairs with equal ids show the same image and are not each other's negatives."""

    @property
    def label_count(self) -> int:
        """Number of tokens that ITG predicts: all but the first of each text."""
        return int(self.mask[:, 1:].sum())


class LanguageHead(nn.Module):
    """BERT's prediction head; its output matrix is the word embedding of the Q-Former."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.transform = Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        nn.init.normal_(self.transform.weight, std=0.02)
        nn.init.zeros_(self.transform.bias)

    def forward(self, hidden: Float[Tensor, "M D"], word_embedding: Float[Tensor, "V D"]) -> Float[Tensor, "M V"]:
        return linear(self.norm(F.gelu(self.transform(hidden))), word_embedding, self.bias)


def _first(mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """True for the first token of each text, [CLS]."""
    return torch.arange(mask.shape[1], device=mask.device).expand(mask.shape) == 0


class RepresentationModel(nn.Module):
    """Frozen image encoder, Q-Former and the three heads of stage 1.

    The names of its parts begin the names of its parameters, which recipes use to say what trains at which rate:
    ``vision``, ``image_norm``, ``qformer``, ``image_projection``, ``text_projection``, ``matching_head``,
    ``language_head``, ``temperature``.
    """

    def __init__(self, vision: ImageEncoder, config: QFormerConfig, enabled: ObjectivesConfig) -> None:
        super().__init__()
        self.enabled = enabled
        self.vision = vision
        self.image_norm = nn.LayerNorm(vision.width, eps=config.image_norm_eps)
        self.qformer = QFormer(config, vision.width)
        self.image_projection = nn.Linear(config.hidden_size, config.image_text_hidden_size)
        self.text_projection = nn.Linear(config.hidden_size, config.image_text_hidden_size)
        self.matching_head = nn.Linear(config.hidden_size, 2)
        self.language_head = LanguageHead(config)
        # A plain divisor of the cosines, learned.
        self.temperature = nn.Parameter(torch.tensor(0.07))

    # -- encoding ------------------------------------------------------------------------------------------------

    def memory(self, images: Shaped[Tensor, "B ..."]) -> ImageMemory:
        """What the Q-Former remembers of images: pixels [B, 3, H, W] or features [B, P, E]."""
        return self.qformer.memory(encode_images(self.vision, images), self.image_norm)

    def embed_memory(self, memory: ImageMemory) -> Float[Tensor, "B Q C"]:
        """Unit vectors, one a query, of images in the contrastive space."""
        return self._project(self.image_projection, self.qformer(memory).queries)

    def embed_texts(self, ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B C"]:
        """Unit vectors of texts in the contrastive space: the projected output at [CLS]."""
        text = self.qformer(None, ids, attention_mask("unimodal", 0, mask), text_output=_first(mask)).text
        return self._project(self.text_projection, text[:, 0])

    def match(self, memory: ImageMemory, ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B 2"]:
        """Logits of (not matched, matched) of pairs, averaged over the queries (§3.2, ITM)."""
        bidirectional = attention_mask("bidirectional", self.qformer.config.num_query_tokens, mask)
        queries = self.qformer(memory, ids, bidirectional, text_output=False).queries
        return self.matching_head(queries).float().mean(dim=1)

    @torch.no_grad()
    def match_candidates(
        self,
        images: Shaped[Tensor, "I ..."],
        ids: Int[Tensor, "T L"],
        mask: Bool[Tensor, "T L"],
        candidates: Int[Tensor, "I K"],
        at_once: int = 64,
    ) -> Float[Tensor, "I K 2"]:
        """Logits of (not matched, matched) of each image with K texts of its own, for re-ranking (§4.4).

        An image's memory is made once for all its texts, and texts of like length go through together.

        Args:
            images: pixels [I, 3, H, W] or features [I, P, E].
            ids, mask: all texts.
            candidates: which texts, for each image.
            at_once: pairs that go through the Q-Former together.
        """
        lengths = mask.sum(dim=1)
        rows = []
        for features, wanted in zip(encode_images(self.vision, images), candidates, strict=True):
            memory = self.qformer.memory(features[None], self.image_norm)
            order = lengths[wanted].argsort()
            parts = []
            for texts in wanted[order].split(at_once):
                longest = int(lengths[texts].max())
                parts.append(self.match(memory.repeat(len(texts)), ids[texts, :longest], mask[texts, :longest]))
            rows.append(torch.cat(parts)[order.argsort()])
        return torch.stack(rows)

    @staticmethod
    def _project(projection: nn.Linear, hidden: Float[Tensor, "*rest D"]) -> Float[Tensor, "*rest C"]:
        # Cosines divided by a temperature of .07 lose too much in half precision.
        with torch.autocast(hidden.device.type, enabled=False):
            return F.normalize(projection(hidden.to(projection.weight.dtype)), dim=-1)

    # -- training ------------------------------------------------------------------------------------------------

    def forward(
        self,
        batch: RepresentationBatch,
        label_count: float | None = None,
        negatives: Negatives | None = None,
        seed: int | None = None,
    ) -> Outcome:
        """The losses that the recipe enables: ``itc``, ``itm``, ``itg``, ``query_diversity``.

        Args:
            batch: this process's pairs. A batch of one works: it has nothing to contrast, so its ITC loss is zero
                and ITM sees the matched pair alone.
            label_count: see :func:`objectives.language_modeling`.
            negatives: the hard negatives to use instead of drawing them.
            seed: of drawing them, the same in all processes: the draws are those that one process would make with the
                pairs of all. None: each process draws with its own random numbers.

        Returns:
            Losses, and beside them ``itc_r1`` (share of images whose best text in the batch is theirs, and the
            other way round, averaged), ``itc_temperature``, ``itm_accuracy``, ``itg_perplexity`` and those of
            :func:`objectives.query_statistics`.
        """
        features = encode_images(self.vision, batch.images)  # [B, P, E]
        memory = self.qformer.memory(features, self.image_norm)
        queries, length = self.qformer.config.num_query_tokens, batch.ids.shape[1]
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}

        # One pass for ITC and ITG: [queries; text; text that begins with [DEC]].
        generated = batch.ids.clone()
        generated[:, 0] = self.qformer.decoder_start
        positions = torch.arange(length, device=batch.ids.device)
        if self.enabled.itg:
            ids, mask = torch.cat([batch.ids, generated], 1), contrast_and_generate_mask(queries, batch.mask)
            positions = positions.repeat(2)
            # ITC reads [CLS], ITG what has a label.
            wanted = torch.cat([_first(batch.mask), F.pad(batch.mask[:, 1:], (0, 1))], 1)
        else:
            ids, mask, wanted = batch.ids, attention_mask("unimodal", queries, batch.mask), _first(batch.mask)
        out = self.qformer(memory, ids, mask, positions, wanted)
        metrics |= objectives.query_statistics(out.queries)
        if self.enabled.query_diversity:
            losses["query_diversity"] = objectives.query_diversity(out.queries)

        if self.enabled.itc or self.enabled.itm:
            every_ids = self._gather_padded(batch.ids, 0)  # [N, L]
            image_to_text, text_to_image, positive = self._compare(out.queries, out.text[:, 0], batch, every_ids)
            if self.enabled.itc:
                losses["itc"] = objectives.image_text_contrastive(
                    image_to_text, text_to_image, positive, self.enabled.label_smoothing
                )
                hits = [positive.gather(1, s.argmax(1, keepdim=True)) for s in (image_to_text, text_to_image)]
                metrics["itc_r1"] = torch.cat(hits).float().mean()
                metrics["itc_temperature"] = self.temperature.detach()
            if self.enabled.itm:
                if negatives is None:
                    negatives = self._draw(image_to_text.detach(), text_to_image.detach(), positive, seed)
                loss, accuracy = self._matching(features, memory, batch, every_ids, positive, negatives)
                losses["itm"], metrics["itm_accuracy"] = loss, accuracy

        if self.enabled.itg:
            labeled = batch.mask[:, 1:]
            states = out.text[:, length:-1][labeled]  # [M, D]: the vocabulary is projected to nowhere else
            assert self.qformer.word_embedding is not None
            head = partial(self.language_head, word_embedding=self.qformer.word_embedding.weight)
            labels = batch.ids[:, 1:][labeled]
            written = objectives.language_modeling(states, head, labels, label_count, self.enabled.label_smoothing)
            losses["itg"], metrics["itg_perplexity"] = written.loss, written.perplexity
        return Outcome(losses, metrics)

    def _gather(self, tensor: Shaped[Tensor, "B *rest"]) -> Shaped[Tensor, "N *rest"]:
        """Of all processes while training. In evaluation each process keeps to its own batch (N = B)."""
        return gather(tensor) if self.training else tensor

    def _gather_padded(self, tensor: Shaped[Tensor, "B T"], padding: int | bool) -> Shaped[Tensor, "N L"]:
        return gather_padded(tensor, padding) if self.training else tensor

    def _compare(
        self,
        queries: Float[Tensor, "B Q D"],
        cls: Float[Tensor, "B D"],
        batch: RepresentationBatch,
        every_ids: Int[Tensor, "N L"],
    ) -> tuple[Float[Tensor, "B N"], Float[Tensor, "B N"], Bool[Tensor, "B N"]]:
        """Similarities over temperature with the pairs of all processes, and which of them belong together.

        Pairs belong together when they show the same image or say the same text: a caption that two pictures
        share (shops and hospitals have many) is right for both.
        """
        length = batch.ids.shape[1]
        images = self._project(self.image_projection, queries)  # [B, Q, C]
        texts = self._project(self.text_projection, cls)  # [B, C]
        temperature = self.temperature.clamp(min=1e-3)
        with torch.autocast(images.device.type, enabled=False):
            image_to_text = objectives.image_text_similarity(images, self._gather(texts)) / temperature
            text_to_image = objectives.image_text_similarity(self._gather(images), texts).T / temperature
        own = F.pad(batch.ids, (0, every_ids.shape[1] - length))
        same_image = batch.image_ids[:, None] == self._gather(batch.image_ids)
        same_text = (own[:, None] == every_ids).all(dim=2)
        return image_to_text, text_to_image, same_image | same_text

    def _draw(
        self,
        image_to_text: Float[Tensor, "B N"],
        text_to_image: Float[Tensor, "B N"],
        positive: Bool[Tensor, "B N"],
        seed: int | None,
    ) -> Negatives:
        chances = (None, None)
        if seed is not None:
            chances = shared_chances(seed, 2, len(positive)).to(positive.device)
        return Negatives(
            objectives.draw_hard_negatives(text_to_image, positive, chances[0]),
            objectives.draw_hard_negatives(image_to_text, positive, chances[1]),
        )

    def _matching(
        self,
        features: Float[Tensor, "B P E"],
        memory: ImageMemory,
        batch: RepresentationBatch,
        ids: Int[Tensor, "N L"],
        positive: Bool[Tensor, "B N"],
        negatives: Negatives,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """ITM on each pair, each text with a wrong image and each image with a wrong text: 3B rows in one pass."""
        exists = ~positive.all(dim=1)
        own = torch.arange(len(features), device=features.device)
        if self.training and process_count() > 1:
            # A negative image of another process is projected here, so that its gradient reaches our parameters.
            drawn = self.qformer.memory(fetch(features, negatives.image_for_text), self.image_norm)
        else:
            drawn = memory.select(negatives.image_for_text)
        mask = self._gather_padded(batch.mask, False)  # [N, L]
        mine = own + (process_index() * len(own) if self.training else 0)
        texts = torch.cat([mine, negatives.text_for_image, mine])
        longest = int(mask[texts].sum(dim=1).max())
        # Each image with its text, each image with a wrong text, each text with a wrong image.
        logits = self.match(memory.repeat(2).join(drawn), ids[texts, :longest], mask[texts, :longest])
        labels = torch.cat([torch.ones_like(own), torch.zeros_like(own), torch.zeros_like(own)])
        counted = torch.cat([torch.ones_like(exists), exists, exists])
        right = logits.argmax(dim=1) == labels
        accuracy = (right & counted).sum() / counted.sum()
        return objectives.image_text_matching(logits, labels, counted), accuracy
