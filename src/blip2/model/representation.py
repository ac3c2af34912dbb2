"""Stage 1: vision-language representation learning from a frozen image encoder (paper §3.2).

Legend: B batch of this process, N batch of all processes, Q queries, T text tokens, L tokens of the longest text of all
processes, M text tokens with a label, P image tokens, D Q-Former width, E image encoder width, C contrastive width, V
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from blip2.backbones.features import pad_tokens
from blip2.backbones.vision import ImageEncoder
from blip2.config import ObjectivesConfig, QFormerConfig
from blip2.distributed import (
    all_gather,
    all_gather_padded,
    gather_rows,
    maximum_over_processes,
    rank,
    rank_consistent_uniforms,
    world_size,
)
from blip2.model.image_memory import ImageMemory, encode_images, padding_mask
from blip2.model.kernels.linear import Linear, linear
from blip2.model.losses import (
    MAX_LOGITS_PER_CHUNK,
    LossOutput,
    image_text_contrastive,
    image_text_matching,
    image_text_similarity,
    language_modeling,
    query_diversity,
    query_statistics,
    recall_at_1,
    sample_hard_negatives,
)
from blip2.model.qformer import QFormer, QFormerOutput, attention_mask, itc_itg_mask


class Negatives(NamedTuple):
    """Hard negatives of this process's batch: a wrong image for each text, and a wrong text for each image.

    They are indices into the batch of all processes, in [0, N).
    """

    image_for_text: Int[Tensor, "B"]
    text_for_image: Int[Tensor, "B"]


@dataclass(frozen=True)
class RepresentationBatch:
    """Image-text pairs for stage 1."""

    images: Shaped[Tensor, "B ..."]
    """Pixels [B, 3, H, W], or cached features [B, P, E] of the frozen encoder."""
    ids: Int[Tensor, "B T"]
    """Token ids of the texts: [CLS] ... [SEP], padded on the right."""
    mask: Bool[Tensor, "B T"]
    """True for text tokens, False for padding."""
    image_ids: Int[Tensor, "B"]
    """Pairs with equal ids have the same image and are not each other's negatives."""

    @property
    def num_labels(self) -> int:
        """Number of tokens that ITG predicts: all but the first of each text."""
        return int(self.mask[:, 1:].sum())


class LanguageHead(nn.Module):
    """BERT's prediction head. Its output matrix is the word embedding of the Q-Former."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.transform = Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        nn.init.normal_(self.transform.weight, std=0.02)
        nn.init.zeros_(self.transform.bias)

    def forward(
        self, hidden_states: Float[Tensor, "M D"], word_embedding: Float[Tensor, "V D"]
    ) -> Float[Tensor, "M V"]:
        return linear(self.norm(F.gelu(self.transform(hidden_states))), word_embedding, self.bias)


def cls_mask(mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Return a mask that is True at the first token of each text, [CLS]."""
    return torch.arange(mask.shape[1], device=mask.device).expand(mask.shape) == 0


class RepresentationModel(nn.Module):
    """The frozen image encoder, the Q-Former and the three heads of stage 1.

    Recipes select parameters by names that begin with ``vision``, ``image_norm``, ``qformer``, ``image_projection``,
    ``text_projection``, ``matching_head``, ``language_head`` or ``temperature``.
    """

    def __init__(self, vision: ImageEncoder, config: QFormerConfig, objectives: ObjectivesConfig) -> None:
        super().__init__()
        self.objectives = objectives
        self.vision = vision
        self.image_norm = nn.LayerNorm(vision.hidden_size, eps=config.image_norm_eps)
        self.qformer = QFormer(config, vision.hidden_size)
        self.image_projection = nn.Linear(config.hidden_size, config.image_text_hidden_size)
        self.text_projection = nn.Linear(config.hidden_size, config.image_text_hidden_size)
        self.matching_head = nn.Linear(config.hidden_size, 2)
        self.language_head = LanguageHead(config)
        # Cosines are divided by the temperature. The parameter is the temperature itself, not its logarithm.
        self.temperature = nn.Parameter(torch.tensor(0.07))

    @property
    def itc_temperature(self) -> Float[Tensor, ""]:
        """The temperature by which ITC divides cosines: the parameter, with a lower bound of 0.001."""
        return self.temperature.clamp(min=1e-3)

    # -- encoding ------------------------------------------------------------------------------------------------------

    def build_image_memory(self, images: Shaped[Tensor, "B ..."]) -> ImageMemory:
        """Encode images, and compute their keys and values in all cross-attentions.

        Args:
            images: pixels [B, 3, H, W] or features [B, P, E].
        """
        return self._project_features(encode_images(self.vision, images))

    def _project_features(self, features: Float[Tensor, "B P E"]) -> ImageMemory:
        """Compute the keys and values of encoded images in all cross-attentions."""
        return self.qformer.project_image(features, self.image_norm, padding_mask(self.vision, features))

    def embed_images(self, memory: ImageMemory) -> Float[Tensor, "B Q C"]:
        """Embed images in the contrastive space: one unit vector per query."""
        return self._project(self.image_projection, self.qformer(memory).queries)

    def embed_texts(self, ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B C"]:
        """Embed texts in the contrastive space.

        Args:
            ids: token ids: [CLS] ... [SEP], padded on the right.
            mask: True for text tokens, False for padding.

        Returns:
            One unit vector per text: the normalized projection of the output at [CLS].
        """
        text = self.qformer(None, ids, attention_mask("unimodal", 0, mask), output_tokens=cls_mask(mask)).text
        return self._project(self.text_projection, text[:, 0])

    def match(self, memory: ImageMemory, ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B 2"]:
        """Return the ITM logits (not matched, matched) of image-text pairs, averaged over the queries (§3.2).

        Args:
            memory: the image of each pair, one row per pair.
            ids: the token ids of the text of each pair: [CLS] ... [SEP], padded on the right.
            mask: True for text tokens, False for padding.
        """
        bidirectional = attention_mask("bidirectional", self.qformer.config.num_query_tokens, mask)
        queries = self.qformer(memory, ids, bidirectional, output_tokens=False).queries
        return self.matching_head(queries).float().mean(dim=1)

    def log_likelihood(
        self, memory: ImageMemory, ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B"]:
        """Return the log-probability of each text, without [CLS], given its image: what ITG maximizes (§3.2).

        See :meth:`match` for the arguments.
        """
        assert self.qformer.word_embedding is not None
        decoder_ids = ids.clone()
        decoder_ids[:, 0] = self.qformer.decoder_start_token_id
        causal = attention_mask("causal", self.qformer.config.num_query_tokens, mask)
        has_label = mask[:, 1:]
        text = self.qformer(memory, decoder_ids, causal, output_tokens=F.pad(has_label, (0, 1))).text
        labels = ids[:, 1:][has_label]
        size = max(1, MAX_LOGITS_PER_CHUNK // self.qformer.config.vocab_size)
        labeled: Float[Tensor, "N D"] = text[:, :-1][has_label]
        log_probs = [
            self.language_head(labeled[start : start + size], self.qformer.word_embedding.weight)
            .float()
            .log_softmax(dim=-1)
            .gather(1, labels[start : start + size, None])
            for start in range(0, len(labels), size)
        ]
        tokens = torch.zeros(has_label.shape, device=ids.device).masked_scatter(has_label, torch.cat(log_probs))
        return tokens.sum(dim=1)

    @torch.no_grad()
    def match_candidates(
        self,
        images: Shaped[Tensor, "I ..."],
        ids: Int[Tensor, "T L"],
        mask: Bool[Tensor, "T L"],
        candidates: Int[Tensor, "I K"],
        batch_size: int = 64,
    ) -> Float[Tensor, "I K 2"]:
        """Return the ITM logits (not matched, matched) of I images with K candidate texts each, for re-ranking (§4.4).

        Keys and values of an image are computed once, and texts of similar length are batched together.

        Args:
            images: pixels [I, 3, H, W] or features [I, P, E].
            ids: token ids of T texts: [CLS] ... [SEP], padded on the right to L tokens.
            mask: True for text tokens, False for padding.
            candidates: the candidate texts of each image, as indices in [0, T).
            batch_size: maximum number of pairs per pass of the Q-Former.
        """
        lengths = mask.sum(dim=1)
        rows: list[Tensor] = []
        for features, texts in zip(encode_images(self.vision, images), candidates, strict=True):
            memory = self._project_features(features[None])
            order = lengths[texts].argsort()
            logits: list[Tensor] = []
            for chunk in torch.split(texts[order], batch_size):
                longest = int(lengths[chunk].max())
                logits.append(self.match(memory.repeat(len(chunk)), ids[chunk, :longest], mask[chunk, :longest]))
            rows.append(torch.cat(logits)[order.argsort()])
        return torch.stack(rows)

    @staticmethod
    def _project(projection: nn.Linear, hidden_states: Float[Tensor, "*rest D"]) -> Float[Tensor, "*rest C"]:
        # Half precision is too coarse for cosines that are divided by a temperature of 0.07.
        with torch.autocast(hidden_states.device.type, enabled=False):
            return F.normalize(projection(hidden_states.to(projection.weight.dtype)), dim=-1)

    # -- training ------------------------------------------------------------------------------------------------------

    def forward(
        self,
        batch: RepresentationBatch,
        num_labels: float | None = None,
        negatives: Negatives | None = None,
        seed: int | None = None,
    ) -> LossOutput:
        """Return the losses that the recipe enables: ``itc``, ``itm``, ``itg``, ``query_diversity``.

        Args:
            batch: the pairs of this process. A batch of one pair is allowed: without other pairs in any process, the
                ITC loss is zero and the ITM loss is that of the matched pair.
            num_labels: see :func:`language_modeling`.
            negatives: the hard negatives. None: they are sampled.
            seed: seed for sampling the hard negatives, equal in all processes. The sampled negatives then do not depend
                on the number of processes. None: each process uses PyTorch's random number generator.

        Returns:
            The losses, and the metrics of the enabled losses: ``itc_r1`` (see :func:`recall_at_1`),
            ``itc_temperature``, ``itm_accuracy``, ``itg_perplexity``, and always those of :func:`query_statistics`.
        """
        enabled = self.objectives
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        features = encode_images(self.vision, batch.images)  # [B, P, E]
        memory = self._project_features(features)
        out = self._encode_for_itc_and_itg(memory, batch)
        metrics |= query_statistics(out.queries)
        if enabled.query_diversity:
            losses["query_diversity"] = query_diversity(out.queries)

        if enabled.itc or enabled.itm:
            # -- ITC: image-text contrastive learning ------------------------------------------------------------------
            all_ids = self._all_gather_padded(batch.ids, 0)  # [N, L]
            positive = self._find_positives(batch, all_ids)
            logits_per_image, logits_per_text = self._contrastive_logits(out.queries, out.text[:, 0])
            if enabled.itc:
                losses["itc"] = image_text_contrastive(
                    logits_per_image, logits_per_text, positive, enabled.label_smoothing
                )
                metrics["itc_r1"] = recall_at_1(logits_per_image, logits_per_text, positive)
                metrics["itc_temperature"] = self.temperature.detach()

            # -- ITM: image-text matching ------------------------------------------------------------------------------
            if enabled.itm:
                if negatives is None:
                    negatives = self._sample_negatives(logits_per_image, logits_per_text, positive, seed)
                logits, labels, valid = self._match_pairs(features, memory, batch, all_ids, positive, negatives)
                losses["itm"] = image_text_matching(logits, labels, valid)
                metrics["itm_accuracy"] = ((logits.argmax(dim=1) == labels) & valid).sum() / valid.sum()

        # -- ITG: image-grounded text generation -----------------------------------------------------------------------
        if enabled.itg:
            has_label = batch.mask[:, 1:]
            hidden_states = out.text[:, batch.ids.shape[1] : -1][has_label]  # [M, D]: the only tokens with logits
            assert self.qformer.word_embedding is not None
            head = partial(self.language_head, word_embedding=self.qformer.word_embedding.weight)
            labels = batch.ids[:, 1:][has_label]
            lm = language_modeling(hidden_states, head, labels, num_labels, enabled.label_smoothing)
            losses["itg"], metrics["itg_perplexity"] = lm.loss, lm.perplexity
        return LossOutput(losses, metrics)

    def _encode_for_itc_and_itg(self, memory: ImageMemory, batch: RepresentationBatch) -> QFormerOutput:
        """Run the Q-Former once for ITC and ITG, over [queries; text; text with [DEC] in place of [CLS]].

        Without ITG, the second copy of the text is left out.
        """
        num_queries, length = self.qformer.config.num_query_tokens, batch.ids.shape[1]
        position_ids, cls = torch.arange(length, device=batch.ids.device), cls_mask(batch.mask)
        if not self.objectives.itg:
            mask = attention_mask("unimodal", num_queries, batch.mask)
            return self.qformer(memory, batch.ids, mask, position_ids, cls)
        decoder_ids = batch.ids.clone()
        decoder_ids[:, 0] = self.qformer.decoder_start_token_id
        ids, mask = torch.cat([batch.ids, decoder_ids], dim=1), itc_itg_mask(num_queries, batch.mask)
        # ITC reads the output at [CLS]; ITG reads the output at each token that is followed by a token to predict.
        output_tokens = torch.cat([cls, F.pad(batch.mask[:, 1:], (0, 1))], dim=1)
        return self.qformer(memory, ids, mask, position_ids.repeat(2), output_tokens)

    def _all_gather(self, tensor: Shaped[Tensor, "B *rest"]) -> Shaped[Tensor, "N *rest"]:
        """Gather the batches of all processes in training. In evaluation each process uses its own batch (N = B)."""
        return all_gather(tensor) if self.training else tensor

    def _all_gather_padded(self, tensor: Shaped[Tensor, "B T"], padding: int | bool) -> Shaped[Tensor, "N L"]:
        return all_gather_padded(tensor, padding) if self.training else tensor

    def _find_positives(self, batch: RepresentationBatch, all_ids: Int[Tensor, "N L"]) -> Bool[Tensor, "B N"]:
        """Return True where a pair of this process and a pair of any process have the same image or the same text.

        Pairs with the same text count because a caption may be right for several images.
        """
        local_ids = F.pad(batch.ids, (0, all_ids.shape[1] - batch.ids.shape[1]))
        same_image = batch.image_ids[:, None] == self._all_gather(batch.image_ids)
        return same_image | (local_ids[:, None] == all_ids).all(dim=2)

    def _contrastive_logits(
        self, queries: Float[Tensor, "B Q D"], cls: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, "B N"], Float[Tensor, "B N"]]:
        """Return similarities / temperature of local images with all texts, and of local texts with all images."""
        images = self._project(self.image_projection, queries)  # [B, Q, C]
        texts = self._project(self.text_projection, cls)  # [B, C]
        temperature = self.itc_temperature
        with torch.autocast(images.device.type, enabled=False):
            logits_per_image = image_text_similarity(images, self._all_gather(texts)) / temperature
            logits_per_text = image_text_similarity(self._all_gather(images), texts).T / temperature
        return logits_per_image, logits_per_text

    def _sample_negatives(
        self,
        logits_per_image: Float[Tensor, "B N"],
        logits_per_text: Float[Tensor, "B N"],
        positive: Bool[Tensor, "B N"],
        seed: int | None,
    ) -> Negatives:
        uniforms = (None, None)
        if seed is not None:
            uniforms = rank_consistent_uniforms(seed, 2, len(positive)).to(positive.device)
        return Negatives(
            sample_hard_negatives(logits_per_text.detach(), positive, uniforms[0]),
            sample_hard_negatives(logits_per_image.detach(), positive, uniforms[1]),
        )

    def _match_pairs(
        self,
        features: Float[Tensor, "B P E"],
        memory: ImageMemory,
        batch: RepresentationBatch,
        all_ids: Int[Tensor, "N L"],
        positive: Bool[Tensor, "B N"],
        negatives: Negatives,
    ) -> tuple[Float[Tensor, "3*B 2"], Int[Tensor, "3*B"], Bool[Tensor, "3*B"]]:
        """Return ITM logits, labels and validity of B pairs, B images with a wrong text, B texts with a wrong image.

        All 3 * B rows go through the Q-Former in one pass. A row with a wrong text or image is not valid if the batch
        of all processes has no negative for the pair.
        """
        local = torch.arange(len(features), device=features.device)
        if self.training and world_size() > 1:
            # Negative images of other processes are projected here, so that gradients reach the local parameters.
            if self.vision.has_padding:  # the rows of all processes must have one shape
                features = pad_tokens(features, maximum_over_processes(features.shape[1], features.device))
            negative_features = gather_rows(features, negatives.image_for_text)
            negative_memory = self._project_features(negative_features)
        else:
            negative_memory = memory.select(negatives.image_for_text)
        all_mask = self._all_gather_padded(batch.mask, False)  # [N, L]
        local_texts = local + (rank() * len(local) if self.training else 0)
        texts = torch.cat([local_texts, negatives.text_for_image, local_texts])
        longest = int(all_mask[texts].sum(dim=1).max())
        logits = self.match(memory.repeat(2).cat(negative_memory), all_ids[texts, :longest], all_mask[texts, :longest])
        labels = torch.cat([torch.ones_like(local), torch.zeros_like(local), torch.zeros_like(local)])
        has_negative = ~positive.all(dim=1)
        return logits, labels, torch.cat([torch.ones_like(has_negative), has_negative, has_negative])
