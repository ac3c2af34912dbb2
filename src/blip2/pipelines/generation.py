"""Use stage-2 models: caption images and answer questions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from blip2.backbones.language import VISUAL_PADDING
from blip2.data.arrays import blank_input
from blip2.data.collate import encode_prompts, pad
from blip2.decoding.kv_cache import PromptBatch
from blip2.decoding.options import ANSWER_DECODING, CAPTION_DECODING, Decoding
from blip2.decoding.text import TextStreamer, final_text, make_stopping_criteria
from blip2.errors import InputError
from blip2.model.losses import IGNORE_INDEX, MAX_LOGITS_PER_CHUNK
from blip2.pipelines.base import as_list, check_all_used, check_image_index, check_texts, texts_of_images
from blip2.pipelines.chat import Chat
from blip2.pipelines.images import Images, ImageStream, OnError, cat_padded
from blip2.pipelines.likelihood import LikelihoodPipeline, check_prompts
from blip2.pipelines.results import Alternative, Explanation, Generated, until_end

WINDOW = 256
"""Number of visual prompts that are collected before the LLM reads them."""
NUM_ALTERNATIVES = 4
"""Number of other tokens that an explanation has for each token."""


class Request(NamedTuple):
    """A text to generate about an image."""

    prompt: str
    question: str | None = None
    """The question in the prompt, for a Q-Former that reads questions."""


class GenerationPipeline(LikelihoodPipeline):
    """A stage-2 model, which generates text about images."""

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

    def caption(
        self,
        images: Images,
        prompt: str | Sequence[str] | None = None,
        decoding: Decoding | None = None,
        *,
        details: bool = False,
        on_error: OnError = "raise",
    ) -> list[Any]:
        """Caption images.

        Args:
            images: images.
            prompt: text that the caption continues: one for all images, or one per image. None: the prompt with which
                the model was trained.
            decoding: options of text generation. None: ``CAPTION_DECODING`` of :mod:`blip2.decoding.options`.
            details: whether to return a :class:`~blip2.Generated` per image, which has the caption with its
                log-probability, the alternatives of the beam search and the attention of the queries.
            on_error: what to do with images that cannot be decoded: ``raise``, ``skip`` or ``return``.

        Returns:
            One caption per image, without the prompt.

        Raises:
            InputError: an image cannot be decoded, the numbers of prompts and images differ, or `prompt` is None for a
                model that was trained to answer questions.
        """
        assert self.config.language is not None
        stream = self._stream(images, on_error, "caption")
        if prompt is None and self.config.language.prompt_has_question:
            raise InputError(
                f"{self.path} was trained to answer questions: use answer() (blip2 ask), or pass a prompt that the"
                " caption continues"
            )
        prompt = self.config.language.prompt if prompt is None else prompt
        prompts = as_list(prompt)
        decoding, advice = decoding or CAPTION_DECODING, "give one prompt per image"
        self._tokenize_prompts(prompts, decoding)
        prompts_of = texts_of_images(
            prompts, stream, "prompt", advice, one_image=False, one_text=isinstance(prompt, str)
        )
        captions = self._generate_stream(
            stream, lambda position: [Request(each) for each in prompts_of(position)], decoding, details
        )
        check_all_used(prompts, prompts_of, stream, "prompt", advice)
        return stream.flatten(captions)

    @overload
    def answer(
        self,
        images: Images,
        questions: str | Sequence[str],
        decoding: Decoding | None = None,
        *,
        details: Literal[False] = False,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> list[str]: ...

    @overload
    def answer(
        self,
        images: Images,
        questions: str | Sequence[str] | Sequence[Sequence[str]],
        decoding: Decoding | None = None,
        *,
        details: bool = False,
        on_error: OnError = "raise",
    ) -> list[Any]: ...

    def answer(
        self,
        images: Images,
        questions: str | Sequence[str] | Sequence[Sequence[str]],
        decoding: Decoding | None = None,
        *,
        details: bool = False,
        on_error: OnError = "raise",
    ) -> list[Any]:
        """Answer questions about images.

        Args:
            images: one image per question, or a single image for all questions.
            questions: one question per image, or a single question for all images. For several questions about each
                image: a list of questions per image, or a list that contains a single list of questions for all images
                (``[["What is it?", "Where is it?"]]``).
            decoding: options of text generation. None: ``ANSWER_DECODING`` of :mod:`blip2.decoding.options`.
            details: whether to return :class:`~blip2.Generated` objects, which have the answer with its
                log-probability, the alternatives of the beam search and the attention of the queries.
            on_error: what to do with images that cannot be decoded: ``raise``, ``skip`` or ``return``.

        Returns:
            One answer per pair of image and question. For lists of questions: a list of answers per image.

        Raises:
            InputError: an image cannot be decoded, the numbers of images and questions differ and neither is 1, or a
                question is blank.
        """
        stream = self._stream(images, on_error, "answer")
        decoding = decoding or ANSWER_DECODING
        given: Any = questions if isinstance(questions, str) or not isinstance(questions, Iterable) else list(questions)
        nested = isinstance(given, list) and any(isinstance(each, list | tuple) for each in given)
        if nested:
            lists = [check_texts(each, "question") for each in given]
            kind, advice = "list", "give one list of questions per image, or one list for all images"
        else:
            lists = [[question] for question in check_texts(given, "question")]
            kind, advice = "question", "give one question per image, or one image or one question for all"
        of_image = texts_of_images(lists, stream, kind, advice, one_image=not nested)
        self._tokenize_prompts(self.format_questions([question for each in lists for question in each]), decoding)

        def requests(position: int) -> list[Request]:
            asked = [question for each in of_image(position) for question in each]
            return [Request(*pair) for pair in zip(self.format_questions(asked), asked, strict=True)]

        answers = self._generate_stream(stream, requests, decoding, details, self._temperature("answer"))
        check_all_used(lists, of_image, stream, kind, advice)
        return stream.arrange(answers) if nested else stream.flatten(answers, requests)

    def stream(
        self, image: Images, prompt: str | None = None, decoding: Decoding | None = None, *, question: str | None = None
    ) -> Iterator[str]:
        """Write a text about an image, and return an iterator of pieces of the text, each as soon as it is written.

        The pieces together are the text that :meth:`caption`, or :meth:`answer` for a question, returns with the same
        options. A piece never ends within a character.

        Args:
            image: one image.
            prompt: text that the caption continues. None: the prompt with which the model was trained.
            decoding: options of text generation, without beam search. None, or ``num_beams`` None: greedy search.
            question: a question to answer, instead of a prompt.

        Raises:
            InputError: there are several images, the image cannot be decoded, both `prompt` and `question` are given,
                or beam search is set.
        """
        default = CAPTION_DECODING if question is None else ANSWER_DECODING
        decoding = (replace(default, num_beams=1) if decoding is None else decoding).without_beams()
        batch = self.encode_prompt(image, prompt, decoding, question=question)
        criteria = make_stopping_criteria(self.tokenizer, decoding)
        steps = self.model.language.stream(batch, decoding, self.eos_token_id, criteria)
        return TextStreamer(self.tokenizer, decoding.stop_strings).pieces(steps)

    @torch.no_grad()
    def encode_prompt(
        self, image: Images, prompt: str | None = None, decoding: Decoding | None = None, *, question: str | None = None
    ) -> PromptBatch:
        """Return what the LLM reads before it writes a text about an image, as a batch of one prompt.

        See :meth:`stream` for the arguments and errors.
        """
        decoding = decoding or (CAPTION_DECODING if question is None else ANSWER_DECODING)
        features, prompts, asked = self._one_request(image, prompt, question)
        ids, mask = (each.to(self.device) for each in self._tokenize_prompts(prompts, decoding))
        visual = self._visual_prompts(features, self._encode_questions(asked, prompts), torch.tensor([0]))
        return self.model.language.prepare_prompts(visual, ids, mask)

    def _one_request(
        self, image: Images, prompt: str | None, question: str | None
    ) -> tuple[Float[Tensor, "1 P E"], list[str], list[str] | None]:
        """Return the features of one image, the prompt, and the question if there is one; see :meth:`stream`."""
        assert self.config.language is not None
        if prompt is not None and question is not None:
            raise InputError("found both prompt and question, expected one of them: leave out prompt, because the"
                             " model's own prompt contains the question")  # fmt: skip
        if prompt is None and question is None and self.config.language.prompt_has_question:
            raise InputError(f"{self.path} was trained to answer questions: give a question, or a prompt that the text"
                             " continues")  # fmt: skip
        asked = None if question is None else check_texts(question, "question")
        prompts = [self.config.language.prompt if prompt is None else prompt] if asked is None else []
        prompts = prompts or self.format_questions(asked or [])
        features = self.encode_images(image)
        if len(features) != 1:
            raise InputError(f"there are {len(features)} images, expected one: use chat() for several")
        return features, prompts, asked

    def chat(
        self,
        images: Images | None = None,
        messages: Sequence[Mapping[str, Any]] = (),
        template: str | None = None,
        decoding: Decoding | None = None,
    ) -> Chat:
        """Begin a conversation about images.

        Args:
            images: one or several images. They stand where `messages` have parts ``{"type": "image"}``, or else before
                the text of the first message of the user. None: the images are in the messages, or there are none.
            messages: messages before the first question, in the form of transformers and OpenAI: dictionaries with
                ``role`` (``system``, ``user`` or ``assistant``) and ``content`` (a text, or a list of parts ``{"type":
                "text", "text": ...}`` and ``{"type": "image", "image": ...}``). If the last one is the user's,
                ``chat.ask()`` without arguments answers it.
            template: how the messages become a prompt: a prompt with {} in the place of each question, or ``chat`` for
                the LLM's own chat template. None: :attr:`question_template`, with which the model was trained.
            decoding: options of text generation, without beam search. None: ``CHAT_DECODING`` of
                :mod:`blip2.decoding.options`.

        Raises:
            InputError: a message is invalid, an image cannot be decoded, or the LLM has no chat template.
        """
        return Chat(self, images, messages, template, decoding)

    @torch.no_grad()
    def generate(
        self,
        images: Images,
        prompts: Sequence[str],
        decoding: Decoding,
        num_return_sequences: int = 1,
        image_index: Sequence[int] | None = None,
        questions: Sequence[str] | None = None,
        uniforms: Float[Tensor, "N max_new_tokens"] | None = None,
    ) -> list[str]:
        """Generate text for prompts about images.

        Args:
            images: images.
            prompts: prompts, as text without an image placeholder.
            decoding: options of text generation.
            num_return_sequences: number of texts per prompt.
            image_index: index in `images` of the image of each prompt. None: one image per prompt. Several prompts
                about one image are cheaper with `image_index` than with copies of the image: the image encoder and the
                Q-Former process the image once.
            questions: the question in each prompt, for a Q-Former that reads questions. The Q-Former then processes an
                image once per question. Other models ignore the questions.
            uniforms: random numbers in [0, 1) for sampling, one for each token of each of the N texts that are
                returned, so that a text does not depend on the other texts. None: PyTorch's own random numbers.

        Returns:
            The N = len(prompts) * `num_return_sequences` texts. The texts of one prompt are next to each other.

        Raises:
            InputError: the numbers of prompts and images (or of prompts and `image_index`) differ, an index or
                `num_return_sequences` is out of range, or a prompt is too long for the LLM or contains an image
                placeholder.
        """
        if num_return_sequences < 1:
            raise InputError(f"num_return_sequences is {num_return_sequences}, expected at least 1")
        encoded = self._encode_questions(questions, prompts)
        if encoded is None:  # what the LLM reads is smaller than the features, which are not needed again
            parts = self._stream(images, label="generate")
            visual = [self._visual_prompts(part, None, torch.arange(len(part))) for _, part in parts]
            inputs = cat_padded(visual, VISUAL_PADDING)
        else:
            inputs = self.encode_images(images)
        indices = list(range(len(inputs)) if image_index is None else image_index)
        if image_index is None and len(indices) != len(prompts):
            raise InputError(f"there are {len(inputs)} images and {len(prompts)} prompts: give one prompt per image")
        if len(indices) != len(prompts):
            raise InputError(f"image_index has {len(indices)} entries for {len(prompts)} prompts: give one per prompt")
        indices = check_image_index(indices, len(inputs))
        tokens = self._tokenize_prompts(prompts, decoding)
        if encoded is not None:  # each question has its own visual prompt
            inputs, indices = self._visual_prompts(inputs, encoded, torch.tensor(indices)), list(range(len(prompts)))
        return self._decode(inputs, indices, *tokens, decoding, num_return_sequences, uniforms)[0]

    def _tokenize_prompts(
        self, prompts: Sequence[str], decoding: Decoding
    ) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
        """Return token ids and attention mask of prompts.

        Raises:
            InputError: a prompt is too long for the LLM or contains an image placeholder.
        """
        check_prompts(prompts)
        side = "right" if self.model.language.is_encoder_decoder else "left"
        ids, mask = encode_prompts(self.tokenizer, prompts, side)
        self._check_length(ids.shape[1], decoding)
        return ids, mask

    def _decode(
        self,
        visual: Float[Tensor, "V Q L"],
        indices: Sequence[int],
        ids: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        decoding: Decoding,
        num_return_sequences: int,
        uniforms: Float[Tensor, "N max_new_tokens"] | None = None,
    ) -> tuple[list[str], list[list[int]]]:
        """Generate text for prompts, and return the texts and their token ids; see :meth:`generate`.

        Args:
            visual: visual prompts.
            indices: index in `visual` of the visual prompt of each prompt.
            ids: token ids of the prompts.
            mask: True for text tokens, False for padding.
            decoding: options of text generation.
            num_return_sequences: number of texts per prompt.
            uniforms: random numbers for sampling.
        """
        # Batch prompts about the same image together, or else prompts of similar length.
        lengths, shared = mask.sum(dim=1).tolist(), len(set(indices)) < len(indices)
        order = sorted(range(len(ids)), key=lambda i: (indices[i] if shared else 0, lengths[i]))
        texts = [""] * len(ids) * num_return_sequences
        tokens: list[list[int]] = [[] for _ in texts]
        criteria = make_stopping_criteria(self.tokenizer, decoding)
        for start in range(0, len(order), self.batch_size):
            rows = torch.tensor(order[start : start + self.batch_size])
            used, image = torch.tensor(indices)[rows].unique(return_inverse=True)
            columns = mask[rows].any(dim=0)
            new = self.model.language.generate(
                visual[used.to(self.device)],
                ids[rows][:, columns].to(self.device),
                mask[rows][:, columns].to(self.device),
                decoding,
                self.eos_token_id,
                num_return_sequences,
                image.to(self.device),
                None if uniforms is None else uniforms.unflatten(0, (-1, num_return_sequences))[rows].flatten(0, 1),
                criteria,
            )
            decoded = self.tokenizer.batch_decode(new, skip_special_tokens=True)
            for i, row in enumerate(rows.tolist()):
                texts[row * num_return_sequences : (row + 1) * num_return_sequences] = (
                    final_text(text, decoding.stop_strings)
                    for text in decoded[i * num_return_sequences : (i + 1) * num_return_sequences]
                )
                for k, sequence in enumerate(new[i * num_return_sequences : (i + 1) * num_return_sequences].tolist()):
                    tokens[row * num_return_sequences + k] = sequence
        return texts, tokens

    @torch.no_grad()
    def _generate_stream(
        self,
        stream: ImageStream,
        requests: Callable[[int], list[Request]],
        decoding: Decoding,
        details: bool,
        temperature: float | None = None,
    ) -> dict[int, list[Any]]:
        """Generate text about a stream of images, and return the results of each image by its position.

        The LLM reads the prompts of up to :data:`WINDOW` visual prompts at a time, so that prompts of similar length
        are batched together.

        Args:
            stream: images.
            requests: maps the position of an image to what is generated about the image.
            decoding: options of text generation.
            details: whether the results are :class:`Generated` objects instead of strings.
            temperature: temperature of the confidence of the results. None: 1.
        """
        results: dict[int, list[Any]] = {}
        positions: list[int] = []
        prompts: list[str] = []
        indices: list[int] = []
        visual: list[Tensor] = []
        maps: list[Tensor] = []

        def flush() -> None:
            if prompts:
                tokens = self._tokenize_prompts(prompts, decoding)
                args = (cat_padded(visual, VISUAL_PADDING), indices, *tokens, decoding)
                made = self._describe(*args, cat_padded(maps), temperature) if details else self._decode(*args, 1)[0]
                for position, result in zip(positions, made, strict=True):
                    results.setdefault(position, []).append(result)
            for each in (positions, prompts, indices, visual, maps):
                each.clear()

        for batch in stream:
            asked = [(i, request) for i, each in enumerate(batch.positions) for request in requests(each)]
            new = [request.prompt for _, request in asked]
            questions = [request.question for _, request in asked if request.question is not None]
            image_index = torch.tensor([i for i, _ in asked])
            encoded = self._encode_questions(questions or None, new)
            start = sum(map(len, visual))
            visual.append(self._visual_prompts(batch.features, encoded, image_index))
            if details:
                maps.append(
                    self._map_rows(self.model.attention_maps, batch.features, encoded, image_index)[:, -1].cpu()
                )
            indices += [start + i for i in (image_index.tolist() if encoded is None else range(len(new)))]
            positions += [batch.positions[i] for i, _ in asked]
            prompts += new
            if start + len(visual[-1]) >= WINDOW:
                flush()
        flush()
        return results

    def _describe(
        self,
        visual: Float[Tensor, "V Q L"],
        indices: Sequence[int],
        ids: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        decoding: Decoding,
        maps: Float[Tensor, "V Q P"],
        temperature: float | None,
    ) -> list[Generated]:
        """Generate text for prompts, with its probabilities and alternatives; see :meth:`_decode`.

        Args:
            maps: the attention of the queries of each visual prompt.
            temperature: temperature of the confidence. None: 1.
        """
        count = decoding.beam_width(1)
        texts, sequences = self._decode(visual, indices, ids, mask, decoding, count)
        end_tokens = self.model.language.eos_token_ids(self.eos_token_id)
        criteria = make_stopping_criteria(self.tokenizer, decoding)
        sequences = [until_end(sequence, end_tokens, criteria) for sequence in sequences]
        rows = [row[row_mask].tolist() for row, row_mask in zip(ids, mask, strict=True)]
        log_probs = self._token_log_probs(
            visual,
            [index for index in indices for _ in range(count)],
            [row for row in rows for _ in range(count)],
            sequences,
        )
        return [
            Generated.make(self.tokenizer, texts[part], sequences[part], log_probs[part], maps[index], temperature)
            for index, part in zip(indices, (slice(i, i + count) for i in range(0, len(texts), count)), strict=True)
        ]

    def _token_log_probs(
        self,
        visual: Float[Tensor, "V Q L"],
        indices: Sequence[int],
        prompts: Sequence[list[int]],
        sequences: Sequence[list[int]],
    ) -> list[list[float]]:
        """Return the LLM's log-probability of each token of sequences, with teacher forcing.

        Args:
            visual: visual prompts.
            indices: index in `visual` of the visual prompt of each sequence.
            prompts: token ids of the prompt of each sequence.
            sequences: token ids of each sequence, without its prompt.
        """
        out: list[list[float]] = []
        for start in range(0, len(sequences), self.batch_size):
            part = slice(start, start + self.batch_size)
            states, targets = self.model.language.hidden_states(
                visual[torch.tensor(indices[part], device=visual.device)],
                *self._append_tokens(prompts[part], sequences[part]),
            )
            log_probs = self.model.language.lm_head(states).float().log_softmax(dim=-1)
            token = log_probs.gather(1, targets[:, None]).squeeze(1)
            out += [each.tolist() for each in token.split([len(new) for new in sequences[part]])]
        return out

    def _append_tokens(
        self, prompts: Sequence[list[int]], sequences: Sequence[list[int]]
    ) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"], Int[Tensor, "B U"]]:
        """Return token ids, attention mask and labels of prompts with sequences; see :meth:`_continuations`."""
        is_encoder_decoder = self.model.language.is_encoder_decoder
        pairs = list(zip(prompts, sequences, strict=True))
        inputs = [prompt if is_encoder_decoder else [*prompt, *new] for prompt, new in pairs]
        labels = [new if is_encoder_decoder else [IGNORE_INDEX] * len(prompt) + new for prompt, new in pairs]
        ids, lengths = pad(inputs, self.eos_token_id), torch.tensor([len(each) for each in inputs])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        return ids.to(self.device), mask.to(self.device), pad(labels, IGNORE_INDEX).to(self.device)

    # -- the Q-Former --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def query_outputs(
        self, images: Images, questions: str | Sequence[str] | None = None, *, on_error: OnError = "raise"
    ) -> Any:
        """Return Z, the outputs of the queries before the projection to the LLM (§3.3).

        Args:
            images: images.
            questions: questions, for a Q-Former that reads questions: one per image, or one image or one question for
                all. None: the queries read the image alone.
            on_error: what to do with images that cannot be decoded: ``raise``, ``skip`` or ``return``.

        Returns:
            A tensor [I, Q, D], or [N, Q, D] with questions. With ``qformer.window``, Q counts the queries of all
            windows of the longest sequence, and those that a shorter sequence lacks are NaN.

        Raises:
            InputError: an image cannot be decoded, the numbers of images and questions differ and neither is 1, or the
                Q-Former does not read questions.
        """
        return self._map_pairs(self.model.query_outputs, images, questions, on_error, torch.nan)

    @torch.no_grad()
    def attention_maps(
        self,
        images: Images,
        questions: str | Sequence[str] | None = None,
        *,
        average: bool = True,
        on_error: OnError = "raise",
    ) -> Any:
        """Return the attention weights of the queries over the image tokens, in all cross-attentions.

        Args:
            images: images.
            questions: questions, as in :meth:`query_outputs`.
            average: whether the weights are averaged over the heads.
            on_error: what to do with images that cannot be decoded: ``raise``, ``skip`` or ``return``.

        Returns:
            A tensor [N, layers, Q, P] whose rows sum to 1; without `average`, [N, layers, heads, Q, P]. With
            ``qformer.window``, a row is zero outside of its window, and zero everywhere if the sequence is too short to
            have the window.
            :func:`~blip2.draw_attention` draws a map.

        Raises:
            InputError: as in :meth:`query_outputs`.
        """
        maps = partial(self.model.attention_maps, average_heads=average)
        return self._map_pairs(maps, images, questions, on_error)

    @torch.no_grad()
    def explain(
        self, image: Images, text: str | Sequence[int], prompt: str | None = None, *, question: str | None = None
    ) -> Explanation:
        """Explain a text about an image: which queries each of its tokens depends on.

        The text may be one that the model wrote, or any other. A query is removed by putting its output for a blank
        image in place of its output for the image. The LLM reads the text once for each query.

        Args:
            image: one image.
            text: the text, without the prompt; or its tokens, such as those that the LLM wrote, which may not be those
                into which the tokenizer splits the text.
            prompt: the prompt that the text continues. None: the prompt with which the model was trained.
            question: the question that the text answers, instead of a prompt.

        Raises:
            InputError: the text is blank or too long for the LLM, the LLM has no such token, there are several images,
                the image cannot be decoded, or both `prompt` and `question` are given.
        """
        features, prompts, asked = self._one_request(image, prompt, question)
        if isinstance(text, str):
            batch = self._continuations(check_texts(text, "text"), prompts)
        else:
            tokens, size = list(text), self.model.language.vocab_size
            if not tokens or not all(0 <= token < size for token in tokens):
                raise InputError(
                    f"the tokens are {str(tokens)[:80]}, expected ids from 0 to {size - 1}: give those of a text"
                )
            ids, _ = self._tokenize_prompts(prompts, Decoding(max_new_tokens=len(tokens)))
            batch = self._append_tokens(ids.tolist(), [tokens])
        self._check_scored_length(batch[0].shape[1], batch[2].shape[1])
        questions, index = self._encode_questions(asked, prompts), torch.tensor([0])
        blank = self.encode_pixels(blank_input(self.model.vision.input_format))
        seen, unseen = (self._visual_prompts(each, questions, index)[0] for each in (features, blank))
        unseen = unseen.repeat(len(seen) // len(unseen), 1)  # the blank image has one window
        every = torch.eye(len(seen), dtype=torch.bool, device=self.device)
        maps = self._map_rows(self.model.attention_maps, features, questions, index)
        return self.explain_continuation(seen, unseen, every, batch, maps[0, -1])

    @torch.no_grad()
    def explain_continuation(
        self,
        seen: Float[Tensor, "S L"],
        unseen: Float[Tensor, "S L"],
        places: Bool[Tensor, "Q S"],
        batch: tuple[Int[Tensor, "1 T"], Bool[Tensor, "1 T"], Int[Tensor, "1 U"]],
        attention_map: Float[Tensor, "Q P"],
    ) -> Explanation:
        """Explain the tokens that follow a sequence of embeddings.

        Args:
            seen: the embeddings that the LLM reads first: a visual prompt, or a conversation that contains one.
            unseen: the same for a blank image.
            places: the places of each query in the sequence.
            batch: token ids, attention mask and labels of the text after the sequence, as in
                :meth:`~blip2.backbones.language.LanguageModel.hidden_states`.
            attention_map: attention of the queries over the image tokens.
        """
        rows = torch.cat([seen[None], unseen[None], torch.where(places[..., None], unseen, seen)])
        log_probs, best = [], []
        chunk_size = max(MAX_LOGITS_PER_CHUNK // self.model.language.vocab_size, 1)
        for part in rows.split(self.batch_size):
            states, labels = self.model.language.hidden_states(part, *(each.repeat(len(part), 1) for each in batch))
            token = []
            for x, y in zip(states.split(chunk_size), labels.split(chunk_size), strict=True):
                each = self.model.language.lm_head(x).float().log_softmax(dim=-1)
                token.append(each.gather(1, y[:, None]))
                if not log_probs:  # the first row, with the whole image, is in the first part
                    best.append(each.topk(NUM_ALTERNATIVES + 1))
            log_probs.append(torch.cat(token).view(len(part), -1).cpu())
        with_image, without_image, *without_query = torch.cat(log_probs)
        tokens = batch[2][batch[2] != IGNORE_INDEX].tolist()
        values, ids = (torch.cat(each)[: len(tokens)].tolist() for each in zip(*best, strict=True))
        alternatives = tuple(
            tuple(
                Alternative(str(self.tokenizer.decode([other])), value)
                for other, value in zip(others, each, strict=True)
                if other != token
            )[:NUM_ALTERNATIVES]
            for token, others, each in zip(tokens, ids, values, strict=True)
        )
        return Explanation(
            tuple(str(self.tokenizer.decode([token])) for token in tokens),
            tuple(with_image.tolist()),
            tuple(without_image.tolist()),
            alternatives,
            torch.stack([with_image - each for each in without_query], dim=1),
            attention_map.cpu(),
        )

    def _map_pairs(
        self,
        function: Callable[..., Tensor],
        images: Images,
        questions: str | Sequence[str] | None,
        on_error: OnError,
        padding: float = 0.0,
    ) -> Any:
        """Apply a method of the model to images, or to pairs of an image and a question.

        `padding` fills up results that are smaller than others.
        """
        if questions is not None and self.qformer_tokenizer is None:
            raise InputError(f"the Q-Former of {self.path} does not read questions: leave out questions")
        stream = self._stream(images, on_error)
        listed = [] if questions is None else check_texts(questions, "question")
        advice = "give one question per image, or one image or one question for all"
        of_image = (lambda _: [""]) if questions is None else texts_of_images(listed, stream, "question", advice)
        results: dict[int, Tensor] = {}
        for positions, features in stream:
            asked = [(i, question) for i, position in enumerate(positions) for question in of_image(position)]
            texts = [question for _, question in asked]
            encoded = None if questions is None else self._encode_questions(texts, self.format_questions(texts))
            rows = self._map_rows(function, features, encoded, torch.tensor([i for i, _ in asked]), padding)
            counts = [len(of_image(position)) for position in positions]
            results |= zip(positions, rows.split(counts), strict=True)
        if questions is not None:
            check_all_used(listed, of_image, stream, "question", advice)
        return stream.stack(results, of_image, padding)

    def _check_length(self, tokens: int, decoding: Decoding) -> None:
        language, queries = self.model.language, self.model.max_visual_tokens
        positions = language.max_position_embeddings
        new = 0 if language.is_encoder_decoder else decoding.max_new_tokens
        if positions is not None and queries + tokens + new > positions:
            raise InputError(
                f"a prompt has {tokens} tokens, but of the LLM's {positions} positions only {positions - queries - new}"
                f" are left beside {queries} tokens of the image and {new} to generate: shorten the prompt"
            )
