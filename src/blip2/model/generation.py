"""Stage 2: vision-to-language generative learning from a frozen LLM (paper §3.3).

With ``qformer.window``, the Q-Former is applied to windows of a long sequence of features, as in SALMONN (Tang et al.,
2024, §3.1), and the outputs of all windows of a sequence are concatenated.

Legend: B batch, I images, N prompts, M windows, Q queries (of all windows of a prompt), T text tokens, U target tokens,
W tokens of a question, P image tokens, D Q-Former width, E image encoder width, S = queries of a window + W, L width of
the LLM.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from blip2.backbones.language import VISUAL_PADDING, LanguageModel
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


class _QFormerInputs(NamedTuple):
    """The input of the Q-Former for N prompts, in M windows; without windows, M = N."""

    memory: ImageMemory
    ids: Int[Tensor, "M W"] | None
    """Token ids of the questions; None without questions."""
    mask: Bool[Tensor, "M S S"] | None
    """The attention mask over [queries; question]; None without questions."""
    num_windows: list[int] | None
    """Number of windows of each prompt; None without windows."""
    num_tokens: int
    """P, the number of tokens of the longest sequence."""


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
        """Return soft visual prompts as input embeddings of the LLM.

        Args:
            images: pixels [I, 3, H, W] or features [I, P, E].
            questions: N questions, which the queries attend to; the result has one prompt per question. None: the
                result has one prompt per image (N = I).
            image_index: index in [0, I) of the image of each question. An image is encoded once, even if several
                questions have the same image. None: question i has image i (N = I).

        Returns:
            The prompts. With windows, a prompt of fewer windows than the longest is padded at its end with
            :data:`~blip2.backbones.language.VISUAL_PADDING`, which the LLM does not see.
        """
        queries, num_windows = self._run_qformer(images, questions, image_index)
        return _cat_windows(self.projection(queries), num_windows, VISUAL_PADDING)

    def query_outputs(
        self,
        images: Shaped[Tensor, "I ..."],
        questions: Questions | None = None,
        image_index: Int[Tensor, "N"] | None = None,
    ) -> Float[Tensor, "N Q D"]:
        """Return Z, the outputs of the queries before the projection; see :meth:`visual_prompt` for the arguments.

        With windows, the outputs of a sequence of fewer windows than the longest are padded at their end with NaN.
        """
        return _cat_windows(*self._run_qformer(images, questions, image_index), torch.nan)

    def _run_qformer(
        self, images: Shaped[Tensor, "I ..."], questions: Questions | None, image_index: Int[Tensor, "N"] | None = None
    ) -> tuple[Float[Tensor, "M _ D"], list[int] | None]:
        """Return Z of each prompt, or of each window of each prompt; and the number of windows of each prompt, None
        without windows."""
        memory, ids, mask, num_windows, _ = self._qformer_inputs(images, questions, image_index)
        return self.qformer(memory, ids, mask, output_tokens=False).queries, num_windows

    def attention_maps(
        self,
        images: Shaped[Tensor, "I ..."],
        questions: Questions | None = None,
        image_index: Int[Tensor, "N"] | None = None,
        average_heads: bool = True,
    ) -> Float[Tensor, "N layers *heads Q P"]:
        """Return the attention weights of the queries over the image tokens.

        See :meth:`visual_prompt` for `images`, `questions` and `image_index`, and
        :meth:`~blip2.model.qformer.QFormer.attention_maps` for `average_heads` and the result. With windows, the
        weights of a query are zero outside of its window, and those of padded queries are zero everywhere.
        """
        memory, ids, mask, num_windows, num_tokens = self._qformer_inputs(images, questions, image_index)
        maps = self.qformer.attention_maps(memory, ids, mask, average_heads)
        if num_windows is None:
            return maps
        # Each window's map is placed where the window is in the sequence. The last window may end after the sequence.
        stride = self.qformer.config.window_stride
        total = (max(num_windows) - 1) * stride + maps.shape[-1]
        starts = [window * stride for count in num_windows for window in range(count)]
        placed = [
            F.pad(each, (start, total - start - each.shape[-1])) for start, each in zip(starts, maps, strict=True)
        ]
        windows = torch.stack(placed).movedim(-2, 1)  # [M, _, layers, *heads, total]
        return _cat_windows(windows, num_windows, 0.0).movedim(1, -2)[..., :num_tokens]

    def _qformer_inputs(
        self, images: Shaped[Tensor, "I ..."], questions: Questions | None, image_index: Int[Tensor, "N"] | None
    ) -> _QFormerInputs:
        features = encode_images(self.vision, images)
        token_mask = padding_mask(self.vision, features)
        memory = self.qformer.project_image(features, self.image_norm, token_mask)
        config, num_windows, num_tokens = self.qformer.config, None, memory.layer_kv[0][0].keys.shape[2]
        if config.window is not None:
            assert token_mask is not None
            lengths: list[int] = token_mask.sum(dim=1).cpu().numpy().tolist()
            num_windows = [config.count_windows(length) for length in lengths]
            memory = memory.split_windows(num_windows, config.window, config.window_stride)
        if questions is None:
            return _QFormerInputs(memory, None, None, num_windows, num_tokens)
        ids, mask = questions
        if image_index is not None:
            rows = image_index
            if num_windows is not None:
                indices: list[int] = image_index.cpu().numpy().tolist()
                of_image = torch.split(torch.arange(len(memory), device=ids.device), num_windows)
                rows, num_windows = torch.cat([of_image[i] for i in indices]), [num_windows[i] for i in indices]
            memory = memory.select(rows)
        if num_windows is not None:  # each window reads the question
            repeats = torch.tensor(num_windows, device=ids.device)
            ids, mask = (each.repeat_interleave(repeats, dim=0) for each in (ids, mask))
        mask = attention_mask("bidirectional", config.num_query_tokens, mask)
        return _QFormerInputs(memory, ids, mask, num_windows, num_tokens)

    @property
    def max_visual_tokens(self) -> int:
        """The largest number of tokens of a visual prompt."""
        config = self.qformer.config
        return config.num_query_tokens * config.count_windows(self.vision.num_tokens)

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
        queries, num_windows = self._run_qformer(batch.images, batch.questions)
        visual_prompt = _cat_windows(self.projection(queries), num_windows, VISUAL_PADDING)
        hidden_states, labels = self.language.hidden_states(visual_prompt, batch.ids, batch.mask, batch.labels)
        lm = language_modeling(hidden_states, self.language.lm_head, labels, num_labels)
        losses = {"lm": lm.loss}
        if self.objectives.query_diversity:
            losses["query_diversity"] = query_diversity(queries)
        metrics = {"lm_perplexity": lm.perplexity, "lm_accuracy": lm.accuracy}
        return LossOutput(losses, metrics | query_statistics(queries))


def _cat_windows(
    windows: Float[Tensor, "M _ *rest"], num_windows: list[int] | None, padding: float
) -> Float[Tensor, "N Q *rest"]:
    """Concatenate what belongs to the queries of each prompt's windows.

    Args:
        windows: one row per window, prompt by prompt.
        num_windows: the number of windows of each prompt. None: `windows` has one row per prompt, and is returned.
        padding: the value after the last window of prompts that have fewer windows than others.
    """
    if num_windows is None:
        return windows
    return pad_sequence([each.flatten(0, 1) for each in torch.split(windows, num_windows)], True, padding)
