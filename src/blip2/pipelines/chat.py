"""Conversations about images with a stage-2 model, in which text and images are interleaved.

Legend: Q queries, S tokens of the conversation, L width of the LLM.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from blip2.config import IMAGE_TOKEN, QUESTION_PLACEHOLDER
from blip2.data.arrays import blank_input
from blip2.data.collate import MAX_WORDS, check_unicode, encode_questions, normalize_questions, strip_eos
from blip2.decoding.conversation import ConversationDecoder, make_prompt
from blip2.decoding.kv_cache import IncrementalDecoder, PromptBatch, get_pad_token_id, has_per_layer_embeddings
from blip2.decoding.options import CHAT_DECODING, Decoding
from blip2.decoding.text import TextStreamer, final_text, make_stopping_criteria
from blip2.errors import InputError
from blip2.model.generation import Questions
from blip2.pipelines.images import Images
from blip2.pipelines.results import Explanation

if TYPE_CHECKING:
    from blip2.pipelines.generation import GenerationPipeline

Role = Literal["system", "user", "assistant"]
Content = str | Sequence[str | Mapping[str, Any]]
"""The content of a message: a text, or a list of parts ``{"type": "text", "text": ...}`` and ``{"type": "image"}``."""
CHAT_TEMPLATE = "chat"
"""The name by which the LLM's own chat template is chosen."""
SENTENCE_ENDS = (".", "!", "?")


@dataclass(frozen=True)
class _Message:
    role: Role
    parts: tuple[str | int, ...]
    """Texts, and indices of images of the chat."""

    @property
    def text(self) -> str:
        """The texts without the images."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> tuple[int, ...]:
        return tuple(part for part in self.parts if isinstance(part, int))


@dataclass(frozen=True)
class _Written:
    """An answer of the LLM, whose tokens are put into later prompts as the LLM wrote them."""

    prompt: str
    text: str
    tokens: tuple[int, ...]


class _Prompt(NamedTuple):
    """A conversation up to the next answer."""

    text: str
    """The text that the LLM reads, with :data:`IMAGE_TOKEN` in the place of each visual prompt."""
    images: list[tuple[int, str | None]]
    """For each visual prompt, the image and the text that the Q-Former reads, if it reads text."""


class Chat:
    """A conversation about images.

    Each turn costs its new tokens only: the image encoder runs once per image, a visual prompt is computed once, and a
    decoder-only LLM keeps its keys and values (an encoder-decoder, or an LLM without key-value cache, reads the whole
    conversation again in each turn). A Q-Former that reads questions reads every image again for each question, and
    the new visual prompts come before the question.

    Make a chat with :meth:`GenerationPipeline.chat`.

    Example:
        >>> chat = pipeline.chat("cat.jpg")
        >>> chat.ask("What is it?")
        >>> for piece in chat.stream("Where is it?"):
        ...     print(piece, end="", flush=True)
    """

    def __init__(
        self,
        pipeline: GenerationPipeline,
        images: Images | None = None,
        messages: Sequence[Mapping[str, Any]] = (),
        template: str | None = None,
        decoding: Decoding | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._template = _check_template(pipeline, template)
        self._decoding = (CHAT_DECODING if decoding is None else decoding).without_beams()
        self._originals: list[Any] = []
        self._features: list[Tensor] = []
        self._visual_prompts: dict[tuple[int, str | None], Float[Tensor, "Q L"]] = {}
        self._decoder: ConversationDecoder | None = None
        self._answer_number = 0  # of the answer that is being written
        self._pending: list[int] = []
        """Images that belong to the next message of the user."""
        self._messages: list[_Message] = []
        self._written: list[_Written] = []
        if images is not None:
            self.add_images(images)
        self._start = list(self._pending)
        parsed = _parse_messages(messages)
        places = any(isinstance(part, dict) for _, parts in parsed for part in parts)
        for role, parts in parsed:
            # Without places for images in the messages, the images come first.
            self._messages.append(self._make_message(role, parts, places))
        if self._pending and places:
            raise InputError(
                f"there are {len(self._start)} images, but only {len(self._start) - len(self._pending)} places for them"
                " in the messages: add parts {'type': 'image'}, or give fewer images"
            )

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages so far, in the form that :meth:`GenerationPipeline.chat` accepts.

        The list can be changed and continued by another chat; this chat stays as it is.
        """
        return [{"role": each.role, "content": self._content(each)} for each in self._messages]

    def _content(self, message: _Message) -> str | list[dict[str, Any]]:
        if not message.images:
            return message.text
        return [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image", "image": self._originals[part]}
            for part in message.parts
        ]

    def add_images(self, images: Images) -> None:
        """Add images to the next question, before its text.

        Raises:
            InputError: an image cannot be decoded, or the last message is the user's and has no answer yet.
        """
        if self._has_open_question:
            raise InputError(
                "the last message of the user has no answer yet: answer it first, with ask() alone, then add images"
            )
        self._pending += self._store_images(images)

    def _store_images(self, images: Images) -> list[int]:
        """Encode images, and return their indices."""
        features = self._pipeline.encode_images(images)
        originals: list[Any] = [images]
        if isinstance(images, Sequence) and not isinstance(images, str | bytes | bytearray | memoryview):
            originals = list(images)
        # An iterator cannot be read again, and one tensor can have the features of several images.
        if isinstance(images, Iterator) or len(originals) != len(features):
            originals = [each[None] for each in features]
        start = len(self._features)
        self._originals += originals
        self._features += features.split(1)
        return list(range(start, len(self._features)))

    def ask(self, content: Content | None = None, decoding: Decoding | None = None) -> str:
        """Answer the next message of the user.

        Args:
            content: the message: a text, or a list of parts ``{"type": "text", "text": ...}`` and ``{"type": "image",
                "image": ...}``, in any order. None: the last message of :attr:`messages`, which must be the user's.
            decoding: options of text generation. None: those of the chat.

        Returns:
            The answer. Message and answer are added to :attr:`messages`.

        Raises:
            InputError: the message is invalid, an image cannot be decoded, or the conversation does not fit into the
                positions of the LLM.
        """
        return "".join(self.stream(content, decoding))

    def stream(self, content: Content | None = None, decoding: Decoding | None = None) -> Iterator[str]:
        """Like :meth:`ask`, but return an iterator of pieces of the answer, each as soon as it is written.

        The pieces together are the answer. If the iterator is closed early, :attr:`messages` gets the part that was
        read; if another question is asked before that, the answer is discarded.
        """
        decoding = (self._decoding if decoding is None else decoding).without_beams()
        messages = self._with_next(content)
        prompt = self._render(messages)
        batch, keys = self._embed(prompt)
        self._check_length(len(keys), decoding)
        criteria = make_stopping_criteria(self._pipeline.tokenizer, decoding)
        self._answer_number += 1
        pipeline, number = self._pipeline, self._answer_number
        tokens = pipeline.model.language.stream(
            batch,
            decoding,
            pipeline.eos_token_id,
            criteria,
            (lambda prompt: self._read(prompt, keys)) if self._keeps_cache else None,
        )
        return self._answer(messages, prompt.text, tokens, decoding, number)

    def prompt_text(self, content: Content | None = None) -> str:
        """Return the text that the LLM reads before its next answer, with ``<image>`` in the place of each image.

        See :meth:`ask` for the argument. The chat stays as it is.
        """
        return self._render(self._with_next(content)).text

    def encode_prompt(self, content: Content | None = None, decoding: Decoding | None = None) -> PromptBatch:
        """Return what the LLM reads before its next answer; see :meth:`ask` for the arguments. The chat stays as it is.

        Returns:
            A batch of one prompt, in which visual prompts are a part of the text.
        """
        batch, keys = self._embed(self._render(self._with_next(content)))
        self._check_length(len(keys), (self._decoding if decoding is None else decoding).without_beams())
        return batch

    @torch.no_grad()
    def explain(self) -> Explanation:
        """Explain the last answer: which queries each of its tokens depends on, given the conversation before.

        A query is removed as in :meth:`GenerationPipeline.explain`, from all visual prompts of the conversation. The
        LLM reads the conversation once for each query.

        Raises:
            InputError: the last message is not an answer of this chat, the conversation has no image or several, or
                the LLM has embeddings in every layer (Gemma 3n).
        """
        language, device = self._pipeline.model.language, self._pipeline.device
        written = self._written[-1:]
        if not written or self._messages[-1] != _Message("assistant", (written[0].text,)):
            raise InputError("the last message is not an answer of this chat: call ask() first")
        asked = self.copy()
        asked._written = self._written[:-1]
        prompt = asked._render(self._messages[:-1])
        count = len({image for image, _ in prompt.images})
        if count != 1:
            raise InputError(f"the conversation has {count} images, expected one: explain() is for one image")
        if has_per_layer_embeddings(language.network):
            raise InputError("the LLM has embeddings in every layer: use explain() of the pipeline for one question")
        batch, keys = asked._embed(prompt)
        blank = asked.copy()
        blank._features = [self._pipeline.encode_pixels(blank_input(self._pipeline.model.vision.input_format))]
        blank._features *= len(self._features)
        blank._visual_prompts = {}
        for key, own in self._visual_prompts.items():
            one = blank._visual_prompt(*key)  # the blank image has one window
            blank._visual_prompts[key] = one.repeat(len(own) // len(one), 1)
        image, text = prompt.images[-1]
        queries = range(len(self._visual_prompts[image, text]))
        places = [[isinstance(key, tuple) and key[-1] == query for key in keys] for query in queries]
        labels = torch.tensor([written[0].tokens], device=device)
        ids = labels[:, :0] if language.is_encoder_decoder else labels
        return self._pipeline.explain_continuation(
            batch.inputs_embeds()[0][0],
            blank._embed(prompt)[0].inputs_embeds()[0][0],
            torch.tensor(places, device=device),
            (ids, torch.ones_like(ids).bool(), labels),
            self._pipeline.model.attention_maps(self._features[image], self._questions(text))[0, -1],
        )

    def reset(self) -> None:
        """Forget all messages. The images with which the chat was made belong to the next question again."""
        self._messages, self._written, self._pending = [], [], list(self._start)
        self._answer_number += 1
        # The other images are forgotten too. Later ones get their indices, which the keys of the cache contain.
        kept = len(self._start)
        self._originals, self._features = self._originals[:kept], self._features[:kept]
        self._visual_prompts = {key: value for key, value in self._visual_prompts.items() if key[0] < kept}
        self._decoder = None

    def copy(self) -> Chat:
        """Return an independent chat with the same history."""
        copied = copy.copy(self)
        for name in ("_originals", "_features", "_visual_prompts", "_pending", "_messages", "_written", "_start"):
            setattr(copied, name, getattr(self, name).copy())
        copied._decoder = None if self._decoder is None else self._decoder.copy()
        return copied

    # -- messages ------------------------------------------------------------------------------------------------------

    @property
    def _has_open_question(self) -> bool:
        return bool(self._messages) and self._messages[-1].role == "user"

    def _with_next(self, content: Content | None) -> list[_Message]:
        """Return the messages up to the next answer."""
        message = self._next_message(content)
        return [*self._messages, *([] if message is None else [message])]

    def _next_message(self, content: Content | None) -> _Message | None:
        """Return the message of the user to add, or None if it is already there."""
        if content is None:
            if not self._has_open_question:
                raise InputError("there is no question to answer: give one, or end the messages with the user's")
            return None
        if self._has_open_question:
            raise InputError(
                "the last message of the user has no answer yet: answer it first, with ask() alone, or leave it out"
            )
        pending = list(self._pending)
        try:
            parts = _parse_content(content, "user", "the message")
            message = self._make_message("user", parts, any(isinstance(part, dict) for part in parts))
            if self._pending:
                raise InputError(
                    f"{len(self._pending)} more images were given than the message has places for: add parts {{'type':"
                    " 'image'}, or leave out all of them to put the images first"
                )
        finally:
            self._pending = pending
        return message

    def _make_message(self, role: Role, parts: list[str | dict[str, Any]], places: bool) -> _Message:
        """Return a message with the images in its parts and the images that were added for it."""
        made: list[str | int] = []
        words = "".join(part for part in parts if isinstance(part, str))
        special = next(
            (each for each in self._pipeline.tokenizer.all_special_tokens if len(each) > 2 and each in words), None
        )
        if special is not None:
            raise InputError(f"the message {_shown(words)} contains {special}, a special token of the LLM: remove it")
        if role == "user" and not places:
            made, self._pending = [*self._pending], []
        for part in parts:
            if isinstance(part, str):
                made.append(part)
            elif part.get("image") is not None:
                made += self._store_images(part["image"])
            elif self._pending:
                made.append(self._pending.pop(0))
            else:
                raise InputError(
                    "a part {'type': 'image'} has no image, and no image is left for it: give the part an 'image', or"
                    " give one more image"
                )
        return _Message(role, tuple(made))

    # -- prompts -------------------------------------------------------------------------------------------------------

    @property
    def _keeps_cache(self) -> bool:
        language = self._pipeline.model.language
        return not language.is_encoder_decoder and language.has_kv_cache

    def _render(self, messages: Sequence[_Message]) -> _Prompt:
        """Return the text of a conversation that ends with a message of the user."""
        images: list[tuple[int, str | None]] = []
        contents: list[str] = []
        seen: list[int] = []
        reads_text = self._pipeline.qformer_tokenizer is not None
        for message in messages:
            # A Q-Former that reads questions extracts what this question needs from all images.
            again = [image for image in dict.fromkeys(seen) if image not in message.images]
            parts = [*(again if reads_text and message.role == "user" else ()), *message.parts]
            seen += message.images
            text = self._qformer_text(message) if reads_text else None
            images += [(part, text) for part in parts if isinstance(part, int)]
            contents.append("".join(part if isinstance(part, str) else IMAGE_TOKEN for part in parts))
        roles: list[Role] = [message.role for message in messages]
        if self._template == CHAT_TEMPLATE:
            return _Prompt(self._apply_chat_template(roles, contents), images)
        return _Prompt(self._apply_question_template(roles, contents), images)

    def _qformer_text(self, message: _Message) -> str:
        pipeline = self._pipeline
        if pipeline.config.qformer.text_input == "prompt":
            return message.text if self._template == CHAT_TEMPLATE else self._fill(message.text)
        return normalize_questions([message.text], pipeline.config.text_normalization)[0]

    def _fill(self, question: str) -> str:
        return self._pipeline.format_questions([question], self._template)[0]

    def _apply_question_template(self, roles: Sequence[Role], contents: Sequence[str]) -> str:
        text = ""
        for role, content in zip(roles, contents, strict=True):
            if role == "assistant":
                text = f"{text.rstrip()} {content}"
            elif role == "system":
                text = f"{content.strip()} "
            else:
                if text and not text.endswith((*SENTENCE_ENDS, " ")):
                    text += "."
                # Images before the question come before its whole prompt, as in training.
                first, question = "", content
                while question.startswith(IMAGE_TOKEN):
                    first, question = first + IMAGE_TOKEN, question.removeprefix(IMAGE_TOKEN)
                filled = self._fill(question)
                space = " " if text and not first and not filled[:1].isspace() and not text.endswith(" ") else ""
                text += first + space + filled
        return text.rstrip()

    def _apply_chat_template(self, roles: Sequence[Role], contents: Sequence[str]) -> str:
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        try:
            text = self._pipeline.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise errors for what they do not support
            raise InputError(
                f"the LLM's chat template refuses the messages ({type(error).__name__}: {error}): change their roles,"
                " or leave out template"
            ) from error
        assert isinstance(text, str)
        if text.count(IMAGE_TOKEN) != sum(content.count(IMAGE_TOKEN) for content in contents):
            raise InputError(
                "the LLM's chat template does not repeat the messages as they are: leave out template to use the prompt"
                " of questions"
            )
        return text

    @torch.no_grad()
    def _embed(self, prompt: _Prompt) -> tuple[PromptBatch, list[Hashable]]:
        """Return a prompt as embeddings, and the content of each position: a token, or a query of an image."""
        language, device = self._pipeline.model.language, self._pipeline.device
        ids: list[int] = []
        keys: list[Hashable] = []
        visual: list[tuple[int, Tensor]] = []
        segments = list(self._segments(prompt.text))
        if segments.count(None) != len(prompt.images):
            raise InputError(
                f"the prompt has {segments.count(None)} places for images, expected {len(prompt.images)}: a normalized"
                f" question keeps its first {MAX_WORDS} words, and no answer may contain {IMAGE_TOKEN}; put images"
                " before the text, shorten the question, or start again with reset() (/reset)"
            )
        images = iter(prompt.images)
        for segment in segments:
            if segment is None:
                image = next(images)
                visual.append((len(ids), self._visual_prompt(*image)))
                num_queries = len(visual[-1][1])
                keys += [(*image, query) for query in range(num_queries)]
                ids += [get_pad_token_id(language.network)] * num_queries
            else:
                keys += segment
                ids += segment
        input_ids = torch.tensor(ids, dtype=torch.long, device=device)
        no_image = torch.empty(1, 0, language.hidden_size, device=device)
        batch = language.prepare_prompts(no_image, input_ids[None], torch.ones_like(input_ids[None]).bool())
        embeds = batch.text_embeds[0].clone()
        for start, each in visual:
            embeds[start : start + len(each)] = each.to(embeds.dtype)
        return make_prompt(input_ids, embeds), keys

    def _segments(self, text: str) -> Iterator[list[int] | None]:
        """Yield the tokens of the parts of a prompt, and None in the place of each visual prompt.

        An answer has the tokens that the LLM wrote, if the prompt repeats the answer after the same text.
        """
        check_unicode([text])
        start = 0
        written: list[tuple[str, list[int] | None]] = []
        for each in self._written:
            if text.startswith(each.prompt) and len(each.prompt) >= start:
                rest = text[len(each.prompt) :]
                spaces = len(rest) - len(rest.lstrip())
                if rest[spaces:].startswith(each.text):
                    written += [(text[start : len(each.prompt)], None), ("", list(each.tokens))]
                    start = len(each.prompt) + spaces + len(each.text)
        written.append((text[start:], None))
        before, after = self._special_tokens()
        is_first = True
        for part, tokens in written:
            if tokens is not None:
                yield tokens
                continue
            for number, piece in enumerate(part.split(IMAGE_TOKEN)):
                if number:
                    yield None
                if piece:
                    encoded = self._pipeline.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
                    yield [*(before if is_first else ()), *encoded]
                    is_first = False
        yield [*(before if is_first else ()), *after]

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """Return the special tokens that the tokenizer puts around a prompt; chat templates have their own."""
        if self._template == CHAT_TEMPLATE:
            return [], []
        tokenizer = self._pipeline.tokenizer
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        full = tokenizer("a")["input_ids"]
        if not self._pipeline.model.language.is_encoder_decoder:
            full = strip_eos(tokenizer, full)
        start = next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)
        return full[:start], full[start + len(plain) :]

    @torch.no_grad()
    def _visual_prompt(self, image: int, text: str | None) -> Float[Tensor, "Q L"]:
        """Return the visual prompt of an image, which is computed once for each text that the Q-Former reads."""
        if (image, text) not in self._visual_prompts:
            visual = self._pipeline.model.visual_prompt(self._features[image], self._questions(text))
            self._visual_prompts[image, text] = visual[0]
        return self._visual_prompts[image, text]

    def _questions(self, text: str | None) -> Questions | None:
        """Return the tokens of a text for the Q-Former, or None."""
        encoded = None if text is None else encode_questions(self._pipeline.qformer_tokenizer, [text])
        return None if encoded is None else Questions(*(each.to(self._pipeline.device) for each in encoded))

    def _check_length(self, num_tokens: int, decoding: Decoding) -> None:
        language = self._pipeline.model.language
        new = 0 if language.is_encoder_decoder else decoding.max_new_tokens
        positions = language.max_position_embeddings
        if positions is not None and num_tokens + new > positions:
            raise InputError(
                f"the conversation has {num_tokens} tokens and its next answer up to {new}, but the LLM has only"
                f" {positions} positions: start again with reset() (/reset), lower max_new_tokens, or continue with"
                " fewer messages in a new chat"
            )

    # -- answers -------------------------------------------------------------------------------------------------------

    def _read(self, prompt: PromptBatch, keys: list[Hashable]) -> IncrementalDecoder:
        """Return the decoder of this chat after it has read a prompt."""
        if self._decoder is None:
            self._decoder = ConversationDecoder(self._pipeline.model.language.network, prompt, keys)
        else:
            self._decoder.read(prompt, keys)
        return self._decoder

    def _answer(
        self, messages: list[_Message], prompt: str, steps: Iterator[list[int]], decoding: Decoding, number: int
    ) -> Iterator[str]:
        """Yield the pieces of an answer, then add it to the messages."""
        streamer = TextStreamer(self._pipeline.tokenizer, decoding.stop_strings)
        tokens: list[int] = []
        is_open = True
        try:
            while is_open:
                if number != self._answer_number:
                    raise InputError(
                        "the chat went on before this answer was read to its end: read an answer before the next"
                        " question, or ask in a copy() of the chat"
                    )
                new = next(steps, None)
                is_open, tokens = new is not None, tokens if new is None else new
                piece = streamer.put(tokens) if is_open else streamer.end(tokens)
                if piece:
                    yield piece
        except (GeneratorExit, KeyboardInterrupt):
            self._add_answer(messages, prompt, streamer.text.rstrip(), tokens, number)
            raise
        self._add_answer(messages, prompt, streamer.text, tokens, number)

    def _add_answer(self, messages: list[_Message], prompt: str, text: str, tokens: list[int], number: int) -> None:
        if number != self._answer_number:
            return
        self._answer_number += 1
        tokenizer, language = self._pipeline.tokenizer, self._pipeline.model.language
        ends = language.eos_token_ids(self._pipeline.eos_token_id)
        kept = tokens[:-1] if tokens and tokens[-1] in ends else tokens
        while kept and final_text(str(tokenizer.decode(kept, skip_special_tokens=True)), None) != text:
            kept = kept[:-1]  # a stop string, or what was not read
        self._messages = [*messages, _Message("assistant", (text,))]
        self._pending = [image for image in self._pending if image not in messages[-1].images]
        if kept:
            self._written = [*self._written, _Written(prompt, text, tuple(kept))]


def _check_template(pipeline: GenerationPipeline, template: str | None) -> str:
    """Check and return the template of a chat.

    Raises:
        InputError: the template is invalid, or the LLM has no chat template.
    """
    if template is None:
        return pipeline.question_template
    if template == CHAT_TEMPLATE:
        if not getattr(pipeline.tokenizer, "chat_template", None):
            raise InputError(
                f"the LLM of {pipeline.path} has no chat template: leave out template to use the prompt of questions,"
                f" {pipeline.question_template!r}"
            )
        return template
    if not isinstance(template, str) or QUESTION_PLACEHOLDER not in template or IMAGE_TOKEN in template:
        raise InputError(
            f"the template is {template!r}, expected {CHAT_TEMPLATE!r} or a prompt with {QUESTION_PLACEHOLDER} in the"
            " place of the question: correct it, or leave it out"
        )
    return template


def _parse_messages(messages: Any) -> list[tuple[Role, list[str | dict[str, Any]]]]:
    """Check messages, and return the role and the parts of each.

    Raises:
        InputError: a message is invalid, or the roles do not alternate.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise InputError(
            f"the messages are {_shown(messages)}, expected a list of {{'role': ..., 'content': ...}}: give a list, or"
            " use ask(text)"
        )
    parsed: list[tuple[Role, list[str | dict[str, Any]]]] = []
    for number, message in enumerate(messages, 1):
        name = f"message {number} of {len(messages)}"
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise InputError(f"{name} is {_shown(message)}, expected {{'role': ..., 'content': ...}}: correct it")
        role, previous = message["role"], parsed[-1][0] if parsed else None
        expected = ("user",) if previous in ("system", "assistant") else ("assistant",)
        if previous is None:
            expected = ("system", "user")
        if role not in expected:
            raise InputError(
                f"{name} has the role {role!r}, expected {' or '.join(map(repr, expected))}: after an optional system"
                " message, user and assistant take turns"
            )
        parsed.append((role, _parse_content(message["content"], role, name)))
    return parsed


def _parse_content(content: object, role: Role, name: str) -> list[str | dict[str, Any]]:
    """Check the content of a message, and return it as texts and dictionaries of images.

    Raises:
        InputError: the content is neither a text nor a list of parts, has no words, or contains special tokens.
    """
    if isinstance(content, str):
        content = [content]
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise InputError(f"the content of {name} is {_shown(content)}, expected a text or a list of parts: correct it")
    parts: list[str | dict[str, Any]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else "text" if isinstance(part, str) else None
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(text, str):
            parts.append(text)
        elif kind == "image" and role == "user" and isinstance(part, Mapping):
            image = next((part[key] for key in ("image", "path") if part.get(key) is not None), None)
            unknown = set(part) - {"type", "image", "path"}
            if unknown:
                raise InputError(
                    f"an image of {name} has the key {sorted(unknown)[0]!r}, expected 'image' or 'path': give a path,"
                    " bytes, a PIL image or an array as 'image'"
                )
            parts.append({"image": image})
        elif kind == "image":
            raise InputError(f"{name} is of role {role!r} and has an image: put images into messages of role 'user'")
        else:
            raise InputError(
                f"{name} has the part {_shown(part)}, expected {{'type': 'text', 'text': ...}} or {{'type': 'image',"
                " 'image': ...}: correct it"
            )
    words = "".join(part for part in parts if isinstance(part, str))
    if role != "assistant" and not words.strip():
        raise InputError(f"{name} is {words!r}, expected words: write them, or leave the message out")
    if IMAGE_TOKEN in words:
        raise InputError(
            f"{name} contains {IMAGE_TOKEN}: remove it, and put a part {{'type': 'image'}} in its place, or nothing to"
            " put the images first"
        )
    return parts


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
