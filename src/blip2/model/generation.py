"""Stage 2: vision-to-language generative learning from a frozen LLM (paper §3.3).

Legend: B batch, I images, N prompts, Q queries, T text tokens, U target tokens, W tokens of a question, P image tokens,
D Q-Former width, E image encoder width, S = Q + W, L width of the LLM.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from blip2.backbones.language import LanguageModel
from blip2.backbones.vision import ImageEncoder
from blip2.config import ObjectivesConfig, QFormerConfig
from blip2.model.image_memory import ImageMemory, encode_images, padding_mask
from blip2.model.losses import IGNORE_INDEX, LossOutput, language_modeling, query_diversity, query_statistics
from blip2.model.qformer import QFormer, attention_mask


class Questions(NamedTuple):
    """Questions on which the queries are conditioned (Figure 7)."""

    ids: Int[Tensor, "N W"]
    """Token ids of the Q-Former's tokenizer: [CLS] ... [SEP], padded on the right."""
    mask: Bool[Tensor, "N W"]
    """True for text tokens, False for padding."""


@dataclass(frozen=True)
class GenerationBatch:
    """Images, the texts that the LLM reads, and the texts that the LLM has to generate."""

    images: Shaped[Tensor, "B ..."]
    """Pixels [B, 3, H, W], or cached features [B, P, E] of the frozen encoder."""
    ids: Int[Tensor, "B T"]
    """Token ids of the LLM's input, padded on the right. Decoder-only LLM: prompt and caption. Encoder-decoder LLM: the
    text that the encoder reads, which is the prompt or the prefix of the caption."""
    mask: Bool[Tensor, "B T"]
    """True for text tokens, False for padding."""
    labels: Int[Tensor, "B U"]
    """Token ids to predict. Decoder-only LLM: `ids` at the tokens of the caption (U = T). Encoder-decoder LLM: the text
    that the decoder generates. All other positions have :data:`IGNORE_INDEX`."""
    questions: Questions | None = None
    """One question per image, for a Q-Former with ``use_qformer_text_input``; otherwise None."""

    @property
    def num_labels(self) -> int:
        """Number of tokens that the LLM predicts."""
        return int((self.labels != IGNORE_INDEX).sum())


class GenerationModel(nn.Module):
    """The frozen image encoder, the Q-Former, one linear layer and the frozen LLM.

    The Q-Former has a text transformer only if it reads questions (``config.use_qformer_text_input``).

    Recipes select parameters by names that begin with ``vision``, ``image_norm``, ``qformer``, ``projection`` or
    ``language``.
    """

    def __init__(
        self,
        vision: ImageEncoder,
        config: QFormerConfig,
        language: LanguageModel,
        objectives: ObjectivesConfig = ObjectivesConfig(),  # noqa: B008  (frozen)
    ) -> None:
        super().__init__()
        self.objectives = objectives
        self.vision = vision
        self.image_norm = nn.LayerNorm(vision.hidden_size, eps=config.image_norm_eps)
        self.qformer = QFormer(config, vision.hidden_size, has_text=config.use_qformer_text_input)
        self.projection = nn.Linear(config.hidden_size, language.hidden_size)
        self.language = language
        self.initialize_projection()

    @torch.no_grad()
    def initialize_projection(self) -> None:
        """Initialize the projection so that its output has the scale of the LLM's token embeddings.

        The scale of Z follows from the weights of the Q-Former's last LayerNorm. Call this method again after loading
        the weights of a Q-Former from stage 1.
        """
        norm = self.qformer.blocks[-1].query_feed_forward.norm
        z_scale = math.sqrt(float((norm.weight.square() + norm.bias.square()).mean()))
        std = self.language.embedding_scale() / (z_scale * math.sqrt(self.projection.in_features))
        nn.init.normal_(self.projection.weight, std=std)
        nn.init.zeros_(self.projection.bias)

    def visual_prompt(
        self,
        images: Shaped[Tensor, "I ..."],
        questions: Questions | None = None,
        image_index: Int[Tensor, "N"] | None = None,
    ) -> Float[Tensor, "N Q L"]:
        """Return soft visual prompts, the input embeddings of the LLM.

        Args:
            images: pixels [I, 3, H, W] or features [I, P, E].
            questions: N questions, which the queries attend to; the result has one prompt per question. None: the
                result has one prompt per image (N = I).
            image_index: index in [0, I) of the image of each question. An image is encoded once, even if several
                questions have the same image. None: question i has image i (N = I).
        """
        return self.projection(self.query_outputs(images, questions, image_index))

    def query_outputs(
        self,
        images: Shaped[Tensor, "I ..."],
        questions: Questions | None = None,
        image_index: Int[Tensor, "N"] | None = None,
    ) -> Float[Tensor, "N Q D"]:
        """Return Z, the outputs of the queries before the projection; see :meth:`visual_prompt` for the arguments."""
        memory, ids, mask = self._qformer_inputs(images, questions, image_index)
        return self.qformer(memory, ids, mask, output_tokens=False).queries

    def attention_maps(
        self,
        images: Shaped[Tensor, "I ..."],
        questions: Questions | None = None,
        image_index: Int[Tensor, "N"] | None = None,
        average_heads: bool = True,
    ) -> Float[Tensor, "N layers *heads Q P"]:
        """Return the attention weights of the queries over the image tokens.

        See :meth:`visual_prompt` for `images`, `questions` and `image_index`, and
        :meth:`~blip2.model.qformer.QFormer.attention_maps` for `average_heads` and the result.
        """
        memory, ids, mask = self._qformer_inputs(images, questions, image_index)
        return self.qformer.attention_maps(memory, ids, mask, average_heads)

    def _qformer_inputs(
        self, images: Shaped[Tensor, "I ..."], questions: Questions | None, image_index: Int[Tensor, "N"] | None
    ) -> tuple[ImageMemory, Int[Tensor, "N W"] | None, Bool[Tensor, "N S S"] | None]:
        """Return the image memory, and token ids and mask of the questions if there are any."""
        features = encode_images(self.vision, images)
        memory = self.qformer.project_image(features, self.image_norm, padding_mask(self.vision, features))
        if questions is None:
            return memory, None, None
        if image_index is not None:
            memory = memory.select(image_index)
        mask = attention_mask("bidirectional", self.qformer.config.num_query_tokens, questions.mask)
        return memory, questions.ids, mask

    def forward(self, batch: GenerationBatch, num_labels: float | None = None, seed: int | None = None) -> LossOutput:
        """Return the language-modeling loss ``lm`` of captions, given images and prompts.

        For an encoder-decoder LLM without a prompt, this is the prefix language-modeling loss of §3.3: ``batch.ids``
        has the prefix of each caption and ``batch.labels`` the rest of the caption.

        Args:
            batch: images and texts of this process.
            num_labels: see :func:`language_modeling`.
            seed: not used, because this stage samples nothing.

        Returns:
            The losses ``lm`` and, if the recipe enables it, ``query_diversity``; and the metrics ``lm_perplexity``,
            ``lm_accuracy`` (share of tokens predicted correctly) and those of :func:`query_statistics`.
        """
        queries = self.query_outputs(batch.images, batch.questions)
        visual_prompt = self.projection(queries)
        hidden_states, labels = self.language.hidden_states(visual_prompt, batch.ids, batch.mask, batch.labels)
        lm = language_modeling(hidden_states, self.language.lm_head, labels, num_labels)
        losses = {"lm": lm.loss}
        if self.objectives.query_diversity:
            losses["query_diversity"] = query_diversity(queries)
        metrics = {"lm_perplexity": lm.perplexity, "lm_accuracy": lm.accuracy}
        return LossOutput(losses, metrics | query_statistics(queries))
