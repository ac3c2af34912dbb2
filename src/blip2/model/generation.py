"""Stage 2: vision-to-language generative learning from a frozen LLM (paper §3.3).

Legend: B batch, I images, Q queries, T text tokens, U target tokens, W tokens of a question, D Q-Former width, L width
of the LLM.
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
from blip2.decoding.search import Decoding
from blip2.model import losses as objectives
from blip2.model.image_memory import encode_images
from blip2.model.losses import Outcome
from blip2.model.qformer import QFormer, attention_mask


class Questions(NamedTuple):
    """What the Q-Former reads beside its queries (Figure 7)."""

    ids: Int[Tensor, "N W"]
    """In the Q-Former's tokens: [CLS] ... [SEP], padded on the right."""
    mask: Bool[Tensor, "N W"]
    """True where a token is real."""


@dataclass(frozen=True)
class GenerationBatch:
    """Images with the text that the LLM reads and the text it is to write."""

    images: Shaped[Tensor, "B ..."]
    """Pixels [B, 3, H, W], or features [B, P, E] of the frozen encoder made beforehand."""
    ids: Int[Tensor, "B T"]
    """Decoder-only: prompt and caption. Encoder-decoder: the prefix, which its encoder reads."""
    mask: Bool[Tensor, "B T"]
    """True where an id is real."""
    labels: Int[Tensor, "B U"]
    """Decoder-only: `ids` where they belong to the caption. Encoder-decoder: the suffix. -100 elsewhere."""
    questions: Questions | None = None
    """Of a Q-Former that reads them."""

    @property
    def label_count(self) -> int:
        """Number of tokens that the LLM predicts."""
        return int((self.labels != objectives.IGNORED).sum())


class GenerationModel(nn.Module):
    """Frozen image encoder, Q-Former, one linear layer, frozen LLM.

    The Q-Former has its text transformer only if it reads questions (``config.reads_questions``).

    The names of its parts begin the names of its parameters: ``vision``, ``image_norm``, ``qformer``,
    ``projection``, ``language``.
    """

    def __init__(
        self,
        vision: ImageEncoder,
        config: QFormerConfig,
        language: LanguageModel,
        enabled: ObjectivesConfig = ObjectivesConfig(),  # noqa: B008  (frozen)
    ) -> None:
        super().__init__()
        self.enabled = enabled
        self.vision = vision
        self.image_norm = nn.LayerNorm(vision.width, eps=config.image_norm_eps)
        self.qformer = QFormer(config, vision.width, has_text=config.use_qformer_text_input)
        self.projection = nn.Linear(config.hidden_size, language.width)
        self.language = language
        self.initialize_projection()

    @torch.no_grad()
    def initialize_projection(self) -> None:
        """Draw the projection anew so that its output has the scale of the LLM's own token embeddings.

        Z leaves a LayerNorm, so its scale is known from that norm's weights: call this again after loading a
        Q-Former from stage 1.
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
        image_of: Int[Tensor, "N"] | None = None,
    ) -> Float[Tensor, "N Q L"]:
        """The soft visual prompt of images: pixels [I, 3, H, W] or features [I, P, E].

        Args:
            questions: queries and questions see each other, and there is a prompt for each question.
            image_of: which image each question is about, None: one each. Every image is encoded once.
        """
        return self.projection(self.query_outputs(images, questions, image_of))

    def query_outputs(
        self,
        images: Shaped[Tensor, "I ..."],
        questions: Questions | None = None,
        image_of: Int[Tensor, "N"] | None = None,
    ) -> Float[Tensor, "N Q D"]:
        """Z, which :meth:`visual_prompt` projects; the arguments are the same."""
        memory = self.qformer.memory(encode_images(self.vision, images), self.image_norm)
        if questions is None:
            return self.qformer(memory).queries
        if image_of is not None:
            memory = memory.select(image_of)
        mask = attention_mask("bidirectional", self.qformer.config.num_query_tokens, questions.mask)
        return self.qformer(memory, questions.ids, mask, text_output=False).queries

    def forward(self, batch: GenerationBatch, label_count: float | None = None, seed: int | None = None) -> Outcome:
        """The language-modeling loss ``lm`` of the captions, given images and prompts.

        For a decoder-only LLM this is the language-modeling loss of §3.3, for an encoder-decoder the prefix
        language-modeling loss: whoever makes the batch has split the text, its prefix being in `ids` and its suffix
        in `labels`.

        Args:
            label_count: see :func:`objectives.language_modeling`.
            seed: of what all processes draw alike, which here is nothing.

        Returns:
            The loss, with ``query_diversity`` where the recipe gives it a weight, and beside it ``lm_perplexity``,
            ``lm_accuracy`` (share of tokens predicted right) and those of :func:`objectives.query_statistics`.
        """
        queries = self.query_outputs(batch.images, batch.questions)
        states, labels = self.language.states(self.projection(queries), batch.ids, batch.mask, batch.labels)
        written = objectives.language_modeling(states, self.language.head, labels, label_count)
        losses = {"lm": written.loss}
        if self.enabled.query_diversity:
            losses["query_diversity"] = objectives.query_diversity(queries)
        metrics = {"lm_perplexity": written.perplexity, "lm_accuracy": written.accuracy}
        return Outcome(losses, metrics | objectives.query_statistics(queries))

    @torch.no_grad()
    def generate(
        self,
        images: Shaped[Tensor, "I ..."],
        ids: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        decoding: Decoding,
        end: int,
        copies: int = 1,
        image_of: Int[Tensor, "B"] | None = None,
    ) -> Int[Tensor, "N U"]:
        """Write about images, each of which is encoded once; see :meth:`LanguageModel.generate` for the arguments."""
        return self.language.generate(self.visual_prompt(images), ids, mask, decoding, end, copies, image_of)
