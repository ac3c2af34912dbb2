"""Use stage-1 models: embed and compare images and texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from blip2.data.collate import encode_texts, normalize_captions
from blip2.model.losses import image_text_similarity
from blip2.model.representation import RepresentationModel
from blip2.pipelines.base import Images, Pipeline, check_texts


class RepresentationPipeline(Pipeline[RepresentationModel]):
    """A stage-1 model, which compares images and texts."""

    @torch.no_grad()
    def embed_images(self, images: Images) -> Float[Tensor, "I Q C"]:
        """Embed images in the contrastive space (§3.2, ITC): one unit vector per query.

        Raises:
            InputError: there are no images, or an image cannot be decoded.
        """
        features = self.encode_images(images)
        parts = [
            self.model.embed_images(self.model.build_image_memory(part)) for part in features.split(self.batch_size)
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def embed_texts(self, texts: str | Sequence[str]) -> Float[Tensor, "T C"]:
        """Embed texts in the contrastive space (§3.2, ITC): one unit vector per text.

        Texts are normalized and truncated as in :meth:`tokenize`.

        Raises:
            InputError: there are no texts, or a text is blank.
        """
        parts = []
        listed = check_texts(texts, "text")
        for start in range(0, len(listed), 4 * self.batch_size):
            parts.append(self.model.embed_texts(*self.tokenize(listed[start : start + 4 * self.batch_size])))
        return torch.cat(parts)

    def similarity(self, images: Images, texts: str | Sequence[str]) -> Float[Tensor, "I T"]:
        """Return the cosine similarity, in [-1, 1], of every image to every text (§3.2, ITC).

        The similarity of a pair is the maximum over the queries of the image.

        Raises:
            InputError: there are no images or texts, an image cannot be decoded, or a text is blank.
        """
        return image_text_similarity(self.embed_images(images), self.embed_texts(texts))

    @torch.no_grad()
    def match(self, images: Images, texts: str | Sequence[str]) -> Float[Tensor, "I T"]:
        """Return the probability in [0, 1] that an image and a text match, for every image and text (§3.2, ITM).

        This method is slower and more accurate than :meth:`similarity`, because the Q-Former processes every pair.

        Raises:
            InputError: there are no images or texts, an image cannot be decoded, or a text is blank.
        """
        features, listed = self.encode_images(images), check_texts(texts, "text")
        candidates = torch.arange(len(listed)).expand(len(features), -1)
        return self.match_candidates(features, listed, candidates).softmax(dim=-1)[..., 1]

    @torch.no_grad()
    def match_candidates(
        self, images: Images, texts: Sequence[str], candidates: Int[Tensor, "I K"]
    ) -> Float[Tensor, "I K 2"]:
        """Return the ITM logits (not matched, matched) of each image with K texts of its own, for re-ranking (§4.4).

        Args:
            images: images.
            texts: all texts.
            candidates: for each image, the indices of its K texts in `texts`.
        """
        features = self.encode_images(images)
        return self.model.match_candidates(
            features, *self.tokenize(texts), candidates.to(self.device), 4 * self.batch_size
        )

    def tokenize(self, texts: Sequence[str]) -> tuple[Int[Tensor, "T L"], Bool[Tensor, "T L"]]:
        """Return token ids and attention mask (True for tokens, False for padding) of texts for the Q-Former.

        Texts are normalized with the model's ``text_normalization``. A text is truncated to twice the model's
        ``max_length`` or to the maximum length of the Q-Former, whichever is smaller. L is the length of the longest
        text in tokens.
        """
        texts = normalize_captions(texts, self.config.text_normalization)
        limit = min(self.config.qformer.max_position_embeddings, 2 * self.config.max_length)
        ids, mask, _ = encode_texts(self.tokenizer, texts, limit)
        return ids.to(self.device), mask.to(self.device)
