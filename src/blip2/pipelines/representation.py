"""Use stage-1 models: embed and compare images and texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from blip2.config import ScoreName
from blip2.data.collate import encode_texts, normalize_captions, pad
from blip2.data.images import ImageError
from blip2.decoding.options import CAPTION_DECODING, Decoding
from blip2.decoding.search import search
from blip2.errors import InputError
from blip2.model.image_memory import ImageMemory
from blip2.model.losses import MAX_LOGITS_PER_CHUNK, image_text_similarity
from blip2.model.qformer import attention_mask
from blip2.model.representation import RepresentationModel
from blip2.model.text_decoder import TextDecoder
from blip2.pipelines.base import check_all_used, check_texts, check_tokens, texts_of_images
from blip2.pipelines.images import Images, OnError
from blip2.pipelines.results import Generated, until_end
from blip2.pipelines.scoring import Rows, Scores, ScoringPipeline

PairFn = Callable[[ImageMemory, Int[Tensor, "N L"], Bool[Tensor, "N L"]], Float[Tensor, "N"]]
"""Scores pairs: maps the image, the token ids and the mask of each pair to a number."""


class RepresentationPipeline(ScoringPipeline[RepresentationModel]):
    """A stage-1 model, which compares images and texts."""

    score_names = ("itm", "itc", "itg")

    @property
    def itc_temperature(self) -> float:
        """The temperature by which ITC divides similarities."""
        return self.model.itc_temperature.item()

    @overload
    def embed_images(
        self, images: Images, *, on_error: Literal["raise", "skip"] = "raise"
    ) -> Float[Tensor, "I Q C"]: ...

    @overload
    def embed_images(self, images: Images, *, on_error: OnError) -> Tensor | list[Tensor | ImageError]: ...

    @torch.no_grad()
    def embed_images(self, images: Images, *, on_error: OnError = "raise") -> Tensor | list[Tensor | ImageError]:
        """Embed images in the contrastive space (§3.2, ITC): one unit vector per query.

        Args:
            images: images.
            on_error: what to do with images that cannot be decoded: ``raise``, ``skip`` or ``return``.

        Returns:
            A tensor [I, Q, C]; with ``return``, a list with a tensor [Q, C] or an error for each image.

        Raises:
            InputError: there are no images, or an image cannot be decoded.
        """
        stream = self._stream(images, on_error, "embed")
        embeds: dict[int, Tensor] = {}
        for positions, features in stream:
            rows = self.model.embed_images(self.model.build_image_memory(features))
            embeds |= zip(positions, rows.split(1), strict=True)
        return stream.stack(embeds)

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

    @overload
    def similarity(
        self,
        images: Images | Float[Tensor, "I Q C"],
        texts: str | Sequence[str] | Float[Tensor, "T C"],
        *,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> Float[Tensor, "I T"]: ...

    @overload
    def similarity(
        self,
        images: Images | Float[Tensor, "I Q C"],
        texts: str | Sequence[str] | Float[Tensor, "T C"],
        *,
        on_error: OnError,
    ) -> Tensor | list[Tensor | ImageError]: ...

    @torch.no_grad()
    def similarity(
        self,
        images: Images | Float[Tensor, "I Q C"],
        texts: str | Sequence[str] | Float[Tensor, "T C"],
        *,
        on_error: OnError = "raise",
    ) -> Tensor | list[Tensor | ImageError]:
        """Return the cosine similarity, in [-1, 1], of every image to every text (§3.2, ITC).

        The similarity of a pair is the maximum over the queries of the image.

        Args:
            images: images, or the result of :meth:`embed_images`.
            texts: texts, or the result of :meth:`embed_texts`.
            on_error: what to do with images that cannot be decoded: ``raise``, ``skip`` or ``return``.

        Returns:
            A tensor [I, T]; with ``return``, a list with a tensor [T] or an error for each image.

        Raises:
            InputError: there are no images or texts, an image cannot be decoded, or a text is blank.
        """
        config = self.config.qformer
        shape = (config.num_query_tokens, config.image_text_hidden_size)
        if isinstance(images, Tensor) and images.ndim == 3 and images.shape[1:] == shape != self._feature_shape:
            embeds: Any = images
        else:
            embeds = self.embed_images(images, on_error=on_error)
        text_embeds = texts.to(self.device) if isinstance(texts, Tensor) else self.embed_texts(texts)
        if isinstance(embeds, Tensor):
            return self._similarity(embeds, text_embeds)
        return [
            each if isinstance(each, ImageError) else self._similarity(each[None], text_embeds)[0] for each in embeds
        ]

    def _similarity(self, images: Float[Tensor, "I Q C"], texts: Float[Tensor, "T C"]) -> Float[Tensor, "I T"]:
        """Compute the similarity for a limited number of images at a time, because there is a cosine for each query."""
        size = max(MAX_LOGITS_PER_CHUNK // (images.shape[1] * len(texts)), 1)
        result = texts.new_empty(len(images), len(texts))
        for part, rows in zip(images.split(size), result.split(size), strict=True):
            rows.copy_(image_text_similarity(part.to(texts), texts))
        return result

    @overload
    def match(
        self, images: Images, texts: str | Sequence[str], *, on_error: Literal["raise", "skip"] = "raise"
    ) -> Float[Tensor, "I T"]: ...

    @overload
    def match(
        self, images: Images, texts: str | Sequence[str], *, on_error: OnError
    ) -> Tensor | list[Tensor | ImageError]: ...

    @torch.no_grad()
    def match(
        self, images: Images, texts: str | Sequence[str], *, on_error: OnError = "raise"
    ) -> Tensor | list[Tensor | ImageError]:
        """Return the probability in [0, 1] that an image and a text match, for every image and text (§3.2, ITM).

        The probability is calibrated if the model is (docs/calibration.md). This method is slower and more accurate
        than :meth:`similarity`, because the Q-Former processes every pair.

        Args:
            images: images.
            texts: texts.
            on_error: what to do with images that cannot be decoded: ``raise``, ``skip`` or ``return``.

        Returns:
            A tensor [I, T]; with ``return``, a list with a tensor [T] or an error for each image.

        Raises:
            InputError: there are no images or texts, an image cannot be decoded, or a text is blank.
        """
        stream = self._stream(images, on_error, "match")
        if stream.total == 0:
            raise InputError("no image was given: give at least one")
        ids, mask = self.tokenize(check_texts(texts, "text"))
        every_text = torch.arange(len(ids), device=self.device)
        results: dict[int, Tensor] = {}
        for positions, features in stream:
            candidates = every_text.expand(len(features), -1)
            logits = self.model.match_candidates(features, ids, mask, candidates, 4 * self.batch_size)
            results |= zip(positions, self.match_probability(logits).split(1), strict=True)
        return stream.stack(results)

    @torch.no_grad()
    def match_candidates(
        self, images: Images, texts: Sequence[str], candidates: Int[Tensor, "I K"]
    ) -> Float[Tensor, "I K 2"]:
        """Return the ITM logits (not matched, matched) of each image with K texts of its own, for re-ranking (§4.4).

        Args:
            images: images.
            texts: all texts.
            candidates: for each image, the indices of its K texts in `texts`.

        Raises:
            InputError: the numbers of images and of rows of `candidates` differ, or an image cannot be decoded.
        """
        stream = self._stream(images, label="match")
        ids, mask = self.tokenize(texts)
        logits: dict[int, Tensor] = {}
        for positions, features in stream:
            chosen = candidates[positions[0] : positions[0] + len(positions)].to(self.device)
            if len(chosen) == len(features):  # otherwise there is an error below
                rows = self.model.match_candidates(features, ids, mask, chosen, 4 * self.batch_size)
                logits |= zip(positions, rows.split(1), strict=True)
        if stream.num_read != len(candidates):
            raise InputError(
                f"there are {stream.num_read} images and candidates for {len(candidates)}: give a row of candidates per"
                " image"
            )
        return stream.stack(logits)

    def match_probability(self, logits: Float[Tensor, "*shape 2"]) -> Float[Tensor, "*shape"]:
        """Return the probability of a match for ITM logits (not matched, matched), calibrated if the model is."""
        temperature = self._temperature("itm")
        return (logits if temperature is None else logits / temperature).softmax(dim=-1)[..., 1]

    # -- the Q-Former --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def query_outputs(self, images: Images, *, on_error: OnError = "raise") -> Any:
        """Return Z, the outputs of the queries (§3.1), as transformers' ``get_qformer_features`` does.

        Args:
            images: images.
            on_error: what to do with images that cannot be decoded: ``raise``, ``skip`` or ``return``.

        Returns:
            A tensor [I, Q, D]; with ``return``, a list with a tensor [Q, D] or an error for each image.

        Raises:
            InputError: there are no images, or an image cannot be decoded.
        """
        return self._map_pairs(lambda memory, *_: self.model.qformer(memory).queries, images, None, on_error)

    @torch.no_grad()
    def embed(self, images: Images, texts: str | Sequence[str], *, on_error: OnError = "raise") -> Any:
        """Return the outputs of the queries for pairs of an image and a text: multimodal features.

        Queries and text attend to each other, as in ITM (§3.2). The result is that of LAVIS's
        ``extract_features(mode="multimodal")``.

        Args:
            images: one image per text, or a single image for all texts.
            texts: one text per image, or a single text for all images; see :meth:`tokenize`.
            on_error: what to do with images that cannot be decoded: ``raise``, ``skip`` or ``return``.

        Returns:
            A tensor [N, Q, D]; with ``return``, a list with a tensor [Q, D] or an error for each pair.

        Raises:
            InputError: an image cannot be decoded, the numbers of images and texts differ and neither is 1, or a text
                is blank.
        """
        return self._map_pairs(
            lambda *inputs: self.model.qformer(*inputs, output_tokens=False).queries, images, texts, on_error
        )

    @torch.no_grad()
    def attention_maps(
        self,
        images: Images,
        texts: str | Sequence[str] | None = None,
        *,
        average: bool = True,
        on_error: OnError = "raise",
    ) -> Any:
        """Return the attention weights of the queries over the image tokens, in all cross-attentions.

        Args:
            images: one image per text, or a single image for all texts.
            texts: texts that the queries attend to, as in ITM: one per image, or a single one for all images. None: the
                queries read the image alone, as in ITC and ITG.
            average: whether the weights are averaged over the heads.
            on_error: what to do with images that cannot be decoded: ``raise``, ``skip`` or ``return``.

        Returns:
            A tensor [N, layers, Q, P] whose rows sum to 1; without `average`, [N, layers, heads, Q, P].
            :func:`~blip2.draw_attention` draws a map.

        Raises:
            InputError: as in :meth:`embed`.
        """
        return self._map_pairs(
            lambda *inputs: self.model.qformer.attention_maps(*inputs, average_heads=average), images, texts, on_error
        )

    def _map_pairs(
        self, function: Callable[..., Tensor], images: Images, texts: str | Sequence[str] | None, on_error: OnError
    ) -> Any:
        """Apply a function of image memory, token ids and mask to images, or to pairs of an image and a text."""
        stream = self._stream(images, on_error)
        listed = [""] if texts is None else check_texts(texts, "text")
        advice = "give one text per image, or one image or one text for all"
        of_image = texts_of_images(listed, stream, "text", advice)
        results: dict[int, Tensor] = {}
        for positions, features in stream:
            memory = self.model.build_image_memory(features)
            if texts is None:
                results |= zip(positions, function(memory, None, None).split(1), strict=True)
                continue
            asked = [(i, text) for i, position in enumerate(positions) for text in of_image(position)]
            parts: list[Tensor] = []
            for start in range(0, len(asked), self.batch_size):
                index, part = zip(*asked[start : start + self.batch_size], strict=True)
                ids, mask = self.tokenize(part)
                both = attention_mask("bidirectional", self.config.qformer.num_query_tokens, mask)
                parts.append(function(memory.select(torch.tensor(index, device=self.device)), ids, both))
            rows = torch.cat(parts).split([len(of_image(position)) for position in positions])
            results |= zip(positions, rows, strict=True)
        check_all_used(listed, of_image, stream, "text", advice)
        return stream.stack(results, of_image)

    # -- captions ------------------------------------------------------------------------------------------------------

    @overload
    def caption(
        self,
        images: Images,
        prompt: str | Sequence[str] | None = None,
        decoding: Decoding | None = None,
        *,
        details: Literal[False] = False,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> list[str]: ...

    @overload
    def caption(
        self,
        images: Images,
        prompt: str | Sequence[str] | None = None,
        decoding: Decoding | None = None,
        *,
        details: bool = False,
        on_error: OnError = "raise",
    ) -> list[Any]: ...

    @torch.no_grad()
    def caption(
        self,
        images: Images,
        prompt: str | Sequence[str] | None = None,
        decoding: Decoding | None = None,
        *,
        details: bool = False,
        on_error: OnError = "raise",
    ) -> list[Any]:
        """Caption images with the Q-Former alone, as in image-grounded text generation (§3.2, ITG).

        These captions show what the queries have read from an image. A stage-2 model, whose LLM writes the captions,
        usually writes better ones.

        Args:
            images: images.
            prompt: must be None: the Q-Former continues no prompt.
            decoding: options of text generation. None: ``CAPTION_DECODING`` of :mod:`blip2.decoding.options`.
            details: whether to return a :class:`~blip2.Generated` per image instead of a string.
            on_error: what to do with images that cannot be decoded: ``raise``, ``skip`` or ``return``.

        Returns:
            One caption per image.

        Raises:
            InputError: an image cannot be decoded, there is a prompt, or `decoding` asks for more tokens than the
                Q-Former has positions for, or for stop strings.
        """
        if prompt is not None:
            raise InputError(
                f"{self.path} is of stage representation, which continues no prompt: leave out prompt, or load a model"
                " of stage generation"
            )
        decoding = decoding or CAPTION_DECODING
        positions = self.config.qformer.max_position_embeddings
        if decoding.max_new_tokens > positions:
            raise InputError(
                f"max_new_tokens is {decoding.max_new_tokens}, but the Q-Former has {positions} positions: set"
                f" max_new_tokens to at most {positions}"
            )
        if decoding.stop_strings is not None:
            raise InputError("stop_strings is set, which captions of a stage-1 model do not support: leave it out")
        stream = self._stream(images, on_error, "caption")
        captions: dict[int, Any] = {}
        for batch in stream:
            captions |= zip(batch.positions, self._write(batch.features, decoding, details), strict=True)
        return stream.arrange(captions)

    def _write(self, features: Float[Tensor, "B P E"], decoding: Decoding, details: bool) -> list[Any]:
        """Return the caption of each image."""
        memory = self.model.build_image_memory(features)
        count = decoding.beam_width(1) if details else 1
        end: Any = self.tokenizer.sep_token_id
        new = search(TextDecoder(self.model, memory), decoding, [end], count)
        texts = [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]
        if not details:
            return texts
        maps = self.model.qformer.attention_maps(memory)[:, -1].cpu()
        sequences = [until_end(sequence, (end,)) for sequence in new.tolist()]
        log_probs = self._token_log_probs(memory, sequences, count)
        parts = [slice(start, start + count) for start in range(0, len(texts), count)]
        return [
            Generated.make(self.tokenizer, texts[part], sequences[part], log_probs[part], attention_map)
            for part, attention_map in zip(parts, maps, strict=True)
        ]

    def _token_log_probs(self, memory: ImageMemory, sequences: Sequence[list[int]], count: int) -> list[list[float]]:
        """Return the log-probability of each token of sequences, of which `count` are about each image."""
        assert self.model.qformer.word_embedding is not None
        lengths = [len(sequence) for sequence in sequences]
        labels = pad(sequences, 0).to(self.device)
        mask = torch.arange(max(lengths), device=self.device) < torch.tensor(lengths, device=self.device)[:, None]
        start = torch.full_like(labels[:, :1], self.model.qformer.decoder_start_token_id)
        out: list[list[float]] = []
        for rows in torch.arange(len(labels), device=self.device).split(4 * self.batch_size):
            causal = attention_mask("causal", self.config.qformer.num_query_tokens, mask[rows])
            ids = torch.cat([start, labels[:, :-1]], dim=1)[rows]
            text = self.model.qformer(memory.select(rows // count), ids, causal).text
            logits = self.model.language_head(text[mask[rows]], self.model.qformer.word_embedding.weight).float()
            token = logits.log_softmax(dim=-1).gather(1, labels[rows][mask[rows]][:, None]).squeeze(1)
            out += [each.tolist() for each in token.split(mask[rows].sum(dim=1).tolist())]
        return out

    def tokenize(self, texts: Sequence[str]) -> tuple[Int[Tensor, "T L"], Bool[Tensor, "T L"]]:
        """Return token ids and attention mask (True for tokens, False for padding) of texts for the Q-Former.

        Texts are normalized with the model's ``text_normalization``. A text is truncated to twice the model's
        ``max_length`` or to the maximum length of the Q-Former, whichever is smaller. L is the length of the longest
        text in tokens.
        """
        texts = normalize_captions(texts, self.config.text_normalization)
        limit = min(self.config.qformer.max_position_embeddings, 2 * self.config.max_length)
        ids, mask, _ = encode_texts(self.tokenizer, texts, limit)
        check_tokens(ids, self.config.qformer)
        return ids.to(self.device), mask.to(self.device)

    # -- scores --------------------------------------------------------------------------------------------------------

    @property
    def class_template(self) -> str:
        """The default template of :meth:`classify`."""
        return "a photo of a {}"

    def _make_rows(
        self, images: Images, prompt: str | Sequence[str] | None, questions: str | Sequence[str] | None
    ) -> Rows:
        if prompt is not None or questions is not None:
            found = "prompt" if questions is None else "questions"
            raise InputError(
                f"{self.path} is of stage representation, which reads no {found}: leave out {found}, or load a model of"
                " stage generation"
            )
        features = self.encode_images(images)
        return Rows(features, list(range(len(features))))

    def _score(
        self,
        by: ScoreName,
        rows: Rows,
        texts: list[str],
        pairs: tuple[Int[Tensor, "N"], Int[Tensor, "N"]] | None,
    ) -> Scores:
        if by == "itc":
            if pairs is None:
                return Scores(self.similarity(rows.features, texts))
            images, embeds = self.embed_images(rows.features), self.embed_texts(texts)
            cosines = [
                torch.einsum("nqc,nc->nq", images[i], embeds[t]).amax(dim=1)
                for i, t in zip(*(each.to(self.device).split(1024) for each in pairs), strict=True)
            ]
            return Scores(torch.cat(cosines))
        ids, mask = self.tokenize(texts)
        shape = (len(rows), len(texts)) if pairs is None else (len(pairs[0]),)
        if pairs is None:
            every_row, every_text = torch.arange(len(rows)), torch.arange(len(texts))
            pairs = every_row.repeat_interleave(len(texts)), every_text.repeat(len(rows))
        if by == "itm":
            return Scores(self._score_pairs(self._match, rows.features, ids, mask, *pairs).view(shape))
        values = self._score_pairs(self.model.log_likelihood, rows.features, ids, mask, *pairs)
        num_tokens = mask[:, 1:].sum(dim=1)[pairs[1].to(self.device)]
        return Scores(values.view(shape), num_tokens.view(shape))

    def _match(self, memory: ImageMemory, ids: Int[Tensor, "N L"], mask: Bool[Tensor, "N L"]) -> Float[Tensor, "N"]:
        return self.match_probability(self.model.match(memory, ids, mask))

    def _score_pairs(
        self,
        score: PairFn,
        features: Float[Tensor, "I P E"],
        ids: Int[Tensor, "T L"],
        mask: Bool[Tensor, "T L"],
        image_index: Int[Tensor, "N"],
        text_index: Int[Tensor, "N"],
    ) -> Float[Tensor, "N"]:
        """Score pairs with passes over both. Keys and values of an image are computed once for all its texts.

        Texts of similar length are compared together, because the texts of a pass are padded to the longest.
        """
        lengths = mask.sum(dim=1).cpu()[text_index]
        values = torch.empty(len(image_index), device=self.device)
        for images in image_index.unique().split(self.batch_size):
            memory = self.model.build_image_memory(features[images.to(features.device)].to(self.device))
            chosen = torch.isin(image_index, images).nonzero().squeeze(1)
            for pairs in chosen[lengths[chosen].argsort(stable=True)].split(4 * self.batch_size):
                columns, texts = int(lengths[pairs].max()), text_index[pairs].to(self.device)
                row_to_image = torch.searchsorted(images, image_index[pairs]).to(self.device)
                selected = memory.select(row_to_image)
                values[pairs.to(self.device)] = score(selected, ids[texts, :columns], mask[texts, :columns])
        return values

    def _ensemble_scores(self, by: ScoreName, rows: Rows, texts: list[str], size: int) -> Float[Tensor, "R K"]:
        if by != "itc":
            return super()._ensemble_scores(by, rows, texts, size)
        classes = F.normalize(self.embed_texts(texts).unflatten(0, (-1, size)).mean(dim=1), dim=-1)
        return image_text_similarity(self.embed_images(rows.features), classes)

    def _choice_logits(self, by: ScoreName, scores: Float[Tensor, "K"]) -> Float[Tensor, "K"]:
        if by == "itc":
            return scores / self.model.temperature.clamp(min=1e-3)
        return scores.clamp(min=torch.finfo(scores.dtype).tiny).log() if by == "itm" else scores
