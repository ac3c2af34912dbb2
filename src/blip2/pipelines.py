"""Using what was trained: captions, answers, embeddings, similarities and matches of anybody's images."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from io import IOBase
from pathlib import Path
from typing import Generic, NoReturn, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blip2 import checkpoint
from blip2.builder import Built, build, choose_device
from blip2.config import IMAGE_TOKEN, Precision, Recipe, Stage
from blip2.data.collate import (
    encode_continuations,
    encode_prompts,
    encode_questions,
    encode_texts,
    fill_prompts,
    normalize_captions,
    normalize_questions,
    pad,
)
from blip2.data.images import ImageLike, read_image, to_pixels
from blip2.decoding.search import Decoding
from blip2.errors import InputError
from blip2.model import losses as objectives
from blip2.model.generation import GenerationModel, Questions
from blip2.model.representation import RepresentationModel

log = logging.getLogger("blip2")

Model = TypeVar("Model", RepresentationModel, GenerationModel)
Images = ImageLike | Iterable[ImageLike]
CAPTION = Decoding()
"""How captions are generated unless said otherwise: beam search of width 5."""
ANSWER = Decoding(length_penalty=-1.0, max_new_tokens=10)
"""How answers are generated unless said otherwise: short ones are favored (§4.1)."""
QUESTION = "Question: {} Answer:"
"""How a question is put to a decoder-only LLM (§4.1)."""
WHOLE = 2**31
"""A limit of tokens that cuts no text."""
SHORT_QUESTION = "Question: {} Short answer:"
"""How a question is put to an encoder-decoder LLM (§4.1)."""


def load(
    path: str | Path,
    device: str | None = None,
    dtype: Precision | None = None,
    *,
    changes: Mapping[str, object] | None = None,
    stage: Stage | None = None,
) -> RepresentationPipeline | GenerationPipeline:
    """Load a checkpoint of any format: what :command:`blip2 train` made, transformers' layout, a file of LAVIS.

    Args:
        path: folder of a run, whose last checkpoint is taken, or of one checkpoint; folder or hub name of a
            ``Blip2ForConditionalGeneration`` or ``Blip2ForImageTextRetrieval`` of transformers; ``.pth`` file of LAVIS.
            What it was found to be is logged.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``; None: a GPU if there is one.
        dtype: of the frozen parts; None: as the recipe says, or else bf16 on a GPU and fp32 on a CPU.
        changes: keys of the recipe that are to have another value (``{"vision.image_size": 364}``), and those that a
            ``.pth`` does not say (``{"vision.name": "eva_vit_g.pth", "language.name": "facebook/opt-2.7b"}``).
        stage: which one, where a checkpoint holds both stages; None: the one that it names itself.

    Raises:
        InputError: there is no checkpoint, it is damaged or of another model, its frozen parts cannot be loaded, or
            there is no such device.
    """
    found = checkpoint.open_checkpoint(str(path), changes).of_stage(stage)
    log.info("%s: %s", found.name, found.about)
    recipe = found.recipe
    if found.absent and recipe.stage == "representation":
        log.info("it has no %s, which begins anew", " and no ".join(part.rstrip(".") for part in found.absent))
    if dtype is not None:
        vision = replace(recipe.vision, dtype=dtype)
        language = None if recipe.language is None else replace(recipe.language, dtype=dtype)
        recipe = replace(recipe, vision=vision, language=language)
    built = build(recipe, choose_device(device), found)
    checkpoint.load_weights(found, built.model)
    built.model.eval()
    return connect(built, recipe, Path(found.name))


def connect(built: Built, recipe: Recipe, path: Path) -> RepresentationPipeline | GenerationPipeline:
    """A model in use, as it is.

    Args:
        path: what it is called in messages.
    """
    if isinstance(built.model, RepresentationModel):
        return RepresentationPipeline(built.model, built.tokenizer, recipe, path)
    assert built.end is not None
    return GenerationPipeline(built.model, built.tokenizer, recipe, path, built.end, built.reader)


class Pipeline(Generic[Model]):
    """What both stages share. Images are paths, bytes, PIL images or arrays; one or a list of them."""

    batch_size = 16
    """Images, or pairs of image and text, that go through the networks at once."""

    def __init__(self, model: Model, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, path: Path) -> None:
        self.model, self.tokenizer, self.recipe, self.path = model, tokenizer, recipe, path

    @property
    def device(self) -> torch.device:
        return self.model.image_norm.weight.device

    def features(self, images: Images) -> Float[Tensor, "I P E"]:
        """Features of the frozen encoder, which every method takes in place of images.

        Raises:
            InputError: there are no images, or one cannot be decoded; the message names it.
        """
        if isinstance(images, Tensor) and images.ndim == 3 and images.shape[1:] == self._feature_shape:
            return images
        pixels = [to_pixels(read_image(image), self.model.vision.preprocessing) for image in as_list(images)]
        if not pixels:
            raise InputError("no image was given, expected at least one")
        return self.encode(torch.stack(pixels))

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "I 3 H W"]) -> Float[Tensor, "I P E"]:
        """Features of images that are prepared already, as the frozen encoder wants them."""
        return torch.cat([self.model.vision.features(part.to(self.device)) for part in pixels.split(self.batch_size)])

    @property
    def _feature_shape(self) -> tuple[int, int]:
        return self.model.vision.tokens, self.model.vision.width

    def _refuse(self, what: str, stage: str) -> NoReturn:
        raise InputError(
            f"{self.path} is of stage {self.recipe.stage}, which cannot {what}: load a model of stage {stage}"
        )

    # Each stage overrides what it can do.

    def caption(
        self, images: Images, prompt: str | Sequence[str] | None = None, decoding: Decoding | None = None
    ) -> list[str]:
        """A caption for each image; see :meth:`GenerationPipeline.caption`."""
        self._refuse("write captions", "generation")

    def answer(self, images: Images, questions: str | Sequence[str], decoding: Decoding | None = None) -> list[str]:
        """An answer for each image and question; see :meth:`GenerationPipeline.answer`."""
        self._refuse("answer questions", "generation")

    def embed_images(self, images: Images) -> Float[Tensor, "I Q C"]:
        """See :meth:`RepresentationPipeline.embed_images`."""
        self._refuse("embed images", "representation")

    def embed_texts(self, texts: str | Sequence[str]) -> Float[Tensor, "T C"]:
        """See :meth:`RepresentationPipeline.embed_texts`."""
        self._refuse("embed texts", "representation")

    def similarity(self, images: Images, texts: str | Sequence[str]) -> Float[Tensor, "I T"]:
        """See :meth:`RepresentationPipeline.similarity`."""
        self._refuse("compare images and texts", "representation")

    def match(self, images: Images, texts: str | Sequence[str]) -> Float[Tensor, "I T"]:
        """See :meth:`RepresentationPipeline.match`."""
        self._refuse("match images and texts", "representation")


class RepresentationPipeline(Pipeline[RepresentationModel]):
    """A model of stage 1: compares images and texts."""

    @torch.no_grad()
    def embed_images(self, images: Images) -> Float[Tensor, "I Q C"]:
        """Unit vectors, one a query (Q), of each image in the space that images and texts share (§3.2, ITC)."""
        features = self.features(images)
        parts = [self.model.embed_memory(self.model.memory(part)) for part in features.split(self.batch_size)]
        return torch.cat(parts)

    @torch.no_grad()
    def embed_texts(self, texts: str | Sequence[str]) -> Float[Tensor, "T C"]:
        """Unit vectors of texts in the space that images and texts share. Texts beyond the limit are cut.

        Raises:
            InputError: a text is blank.
        """
        parts = []
        listed = check_texts(texts, "text")
        for start in range(0, len(listed), 4 * self.batch_size):
            parts.append(self.model.embed_texts(*self.encode_texts(listed[start : start + 4 * self.batch_size])))
        return torch.cat(parts)

    def similarity(self, images: Images, texts: str | Sequence[str]) -> Float[Tensor, "I T"]:
        """Cosine of every image with every text, the best of its queries, in [-1, 1] (§3.2, ITC)."""
        return objectives.image_text_similarity(self.embed_images(images), self.embed_texts(texts))

    @torch.no_grad()
    def match(self, images: Images, texts: str | Sequence[str]) -> Float[Tensor, "I T"]:
        """Probability, in [0, 1], that each image and each text belong together (§3.2, ITM).

        Slower and sharper than :meth:`similarity`: every pair goes through the Q-Former.
        """
        features, listed = self.features(images), check_texts(texts, "text")
        every = torch.arange(len(listed)).expand(len(features), -1)
        return self.match_candidates(features, listed, every).softmax(dim=-1)[..., 1]

    @torch.no_grad()
    def match_candidates(
        self, images: Images, texts: Sequence[str], candidates: Int[Tensor, "I K"]
    ) -> Float[Tensor, "I K 2"]:
        """Logits of (not matched, matched) of each image with K texts of its own, for re-ranking (§4.4)."""
        features = self.features(images)
        return self.model.match_candidates(
            features, *self.encode_texts(texts), candidates.to(self.device), 4 * self.batch_size
        )

    def encode_texts(self, texts: Sequence[str]) -> tuple[Int[Tensor, "T L"], Bool[Tensor, "T L"]]:
        """Tokens of texts for the Q-Former, and where they are real.

        Texts are normalized as ``data.text_normalization`` says; those beyond the limit are cut.
        """
        texts = normalize_captions(texts, self.recipe.data.text_normalization)
        limit = min(self.recipe.qformer.max_position_embeddings, 2 * self.recipe.data.max_length)
        ids, mask, _ = encode_texts(self.tokenizer, texts, limit)
        return ids.to(self.device), mask.to(self.device)


class GenerationPipeline(Pipeline[GenerationModel]):
    """A model of stage 2: writes about images."""

    def __init__(
        self,
        model: GenerationModel,
        tokenizer: PreTrainedTokenizerBase,
        recipe: Recipe,
        path: Path,
        end: int,
        reader: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__(model, tokenizer, recipe, path)
        self.end = end
        self.reader = reader

    def caption(
        self, images: Images, prompt: str | Sequence[str] | None = None, decoding: Decoding | None = None
    ) -> list[str]:
        """A caption for each image.

        Args:
            prompt: text that the caption continues, one for all images or one each; None: the prompt it was trained
                with.
            decoding: how; None: :data:`CAPTION`.

        Raises:
            InputError: an image cannot be decoded, in which case the message names it, there is another number of
                prompts than of images, or no prompt for a model that was trained to answer.
        """
        assert self.recipe.language is not None
        features = self.features(images)
        if prompt is None and self.recipe.language.asks:
            raise InputError(
                f"{self.path} was trained to answer questions: call answer, or give a prompt to go on from"
            )
        prompt = self.recipe.language.prompt if prompt is None else prompt
        prompts = [prompt] * len(features) if isinstance(prompt, str) else list(prompt)
        return self.generate(features, prompts, decoding or CAPTION)

    def answer(self, images: Images, questions: str | Sequence[str], decoding: Decoding | None = None) -> list[str]:
        """An answer for each pair of image and question; one of either goes with all of the other.

        Args:
            decoding: how; None: :data:`ANSWER`.

        Raises:
            InputError: there are several images and another number of questions, or a question is blank.
        """
        features, listed = self.features(images), check_texts(questions, "question")
        if len(listed) == 1:
            listed = listed * len(features)
        image_of = [0] * len(listed) if len(features) == 1 else range(len(features))
        if len(image_of) != len(listed):
            raise InputError(
                f"there are {len(features)} images and {len(listed)} questions: give one question an image, or one of"
                " either for all of the other"
            )
        return self.generate(
            features, self.question_prompts(listed), decoding or ANSWER, image_of=image_of, questions=listed
        )

    @property
    def question_prompt(self) -> str:
        """How a question is put: as the model was trained to read it, or else as in the paper."""
        assert self.recipe.language is not None
        template = self.recipe.language.question_template
        if template is not None:
            return template
        return SHORT_QUESTION if self.model.language.is_encoder_decoder else QUESTION

    def question_prompts(self, questions: Sequence[str], prompt: str | None = None) -> list[str]:
        """The prompts that put questions to the LLM, normalized as ``data.text_normalization`` says.

        Args:
            prompt: with {} where the question goes; None: :attr:`question_prompt`.
        """
        questions = normalize_questions(questions, self.recipe.data.text_normalization)
        return fill_prompts(self.question_prompt if prompt is None else prompt, questions)

    @torch.no_grad()
    def generate(
        self,
        images: Images,
        prompts: Sequence[str],
        decoding: Decoding,
        copies: int = 1,
        image_of: Sequence[int] | None = None,
        questions: Sequence[str] | None = None,
        dice: Float[Tensor, "N longest"] | None = None,
    ) -> list[str]:
        """`copies` texts for each prompt, the copies of one prompt beside each other.

        Args:
            image_of: the image that each prompt is about, counted from 0; None: one each. The vision encoder and the
                Q-Former see an image once, and the LLM once in each batch of its prompts.
            questions: what each prompt asks, for a Q-Former that reads questions, which then looks once a question;
                others leave them out.
            dice: numbers in [0, 1) that decide what is sampled (``decoding.top_p``), one a token, for each text: so it
                does not depend on what else is written. None: PyTorch's own random numbers.

        Raises:
            InputError: there is another number of prompts than of images (than of `image_of`, where it is given), no
                image of such a number, or a prompt that is longer than the LLM can read.
        """
        features = self.features(images)
        owners = list(range(len(features)) if image_of is None else image_of)
        if image_of is None and len(owners) != len(prompts):
            raise InputError(f"there are {len(features)} images and {len(prompts)} prompts: give one prompt an image")
        if len(owners) != len(prompts):
            raise InputError(f"image_of has {len(owners)} numbers for {len(prompts)} prompts: give one a prompt")
        wrong = next((owner for owner in owners if not 0 <= owner < len(features)), None)
        if wrong is not None:
            raise InputError(f"image_of holds {wrong}, expected numbers from 0 to {len(features) - 1}")
        placeholders = next((prompt for prompt in prompts if IMAGE_TOKEN in prompt), None)
        if placeholders is not None:
            raise InputError(f"the prompt {placeholders!r} holds {IMAGE_TOKEN}: leave it out, the image comes first by"
                             " itself")  # fmt: skip
        side = "right" if self.model.language.is_encoder_decoder else "left"
        ids, mask = encode_prompts(self.tokenizer, prompts, side)
        self._check_length(ids.shape[1], decoding)
        asked = self._encode_questions(questions)
        visual = self._visual_prompts(features, asked, torch.tensor(owners))
        if asked is not None:  # a visual prompt is of one question alone
            owners = list(range(len(prompts)))
        # Prompts about one image stand together, and otherwise those of like length.
        lengths, shared = mask.sum(dim=1).tolist(), len(set(owners)) < len(owners)
        order = sorted(range(len(prompts)), key=lambda i: (owners[i] if shared else 0, lengths[i]))
        texts = [""] * len(prompts) * copies
        for start in range(0, len(order), self.batch_size):
            rows = torch.tensor(order[start : start + self.batch_size])
            used, image = torch.tensor(owners)[rows].unique(return_inverse=True)
            columns = mask[rows].any(dim=0)
            new = self.model.language.generate(
                visual[used.to(self.device)],
                ids[rows][:, columns].to(self.device),
                mask[rows][:, columns].to(self.device),
                decoding,
                self.end,
                copies,
                image.to(self.device),
                None if dice is None else dice.unflatten(0, (-1, copies))[rows].flatten(0, 1),
            )
            written = self.tokenizer.batch_decode(new, skip_special_tokens=True)
            for i, row in enumerate(rows.tolist()):
                texts[row * copies : (row + 1) * copies] = (
                    text.strip() for text in written[i * copies : (i + 1) * copies]
                )
        return texts

    @torch.no_grad()
    def log_likelihood(
        self,
        images: Images,
        prompts: Sequence[str],
        texts: Sequence[str],
        image_of: Sequence[int] | None = None,
        questions: Sequence[str] | None = None,
    ) -> Float[Tensor, "N"]:
        """Return the log-probability (natural logarithm) of each text, its end included, behind its prompt.

        Args:
            prompts: the prompt of each text.
            texts: what is scored; not cut.
            image_of: the image that each text is about, counted from 0; None: one each.
            questions: as :meth:`generate` takes them.
        """
        features = self.features(images)
        owners = torch.arange(len(texts)) if image_of is None else torch.tensor(image_of)
        asked = self._encode_questions(questions)
        visual = self._visual_prompts(features, asked, owners)
        if asked is not None:  # a visual prompt is of one question alone
            owners = torch.arange(len(texts))
        out = []
        for start in range(0, len(texts), self.batch_size):
            part = slice(start, start + self.batch_size)
            batch = self._continuations(texts[part], prompts[part])
            states, labels = self.model.language.states(visual[owners[part].to(self.device)], *batch)
            log_probs = self.model.language.head(states).float().log_softmax(dim=-1)
            token = log_probs.gather(1, labels[:, None]).squeeze(1)
            counts = (batch[2] != objectives.IGNORED).sum(dim=1).tolist()
            out += [each.sum() for each in token.split(counts)]
        return torch.stack(out)

    def _encode_questions(self, questions: Sequence[str] | None) -> Questions | None:
        """What the Q-Former reads, normalized; None where it reads no questions."""
        if questions is None:
            return None
        return encode_questions(self.reader, normalize_questions(questions, self.recipe.data.text_normalization))

    def _continuations(
        self, texts: Sequence[str], prompts: Sequence[str]
    ) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"], Int[Tensor, "B U"]]:
        """Ids, mask and labels of texts behind their prompts, as the LLM is trained on them."""
        if not self.model.language.is_encoder_decoder:
            ids, mask, labels, _ = encode_continuations(self.tokenizer, prompts, texts, WHOLE, self.end)
        else:
            ids, mask = encode_prompts(self.tokenizer, prompts, "right")
            rows = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            labels = pad([[*row, self.end] for row in rows], objectives.IGNORED)
        return ids.to(self.device), mask.to(self.device), labels.to(self.device)

    def _visual_prompts(
        self, features: Float[Tensor, "I P E"], questions: Questions | None, image_of: Int[Tensor, "B"]
    ) -> Float[Tensor, "N Q L"]:
        """One an image, or one a question where the Q-Former reads them."""
        if questions is None:
            return torch.cat([self.model.visual_prompt(part) for part in features.split(self.batch_size)])
        parts = []
        for rows in torch.arange(len(image_of)).split(self.batch_size):
            used, image = image_of[rows].unique(return_inverse=True)
            words = int(questions.mask[rows].sum(dim=1).max())
            part = Questions(*(each[rows, :words].to(self.device) for each in questions))
            parts.append(self.model.visual_prompt(features[used.to(self.device)], part, image.to(self.device)))
        return torch.cat(parts)

    def _check_length(self, tokens: int, decoding: Decoding) -> None:
        language, queries = self.model.language, self.recipe.qformer.num_query_tokens
        positions = language.positions
        new = 0 if language.is_encoder_decoder else decoding.max_new_tokens
        if positions is not None and queries + tokens + new > positions:
            raise InputError(
                f"a prompt has {tokens} tokens, which with {queries} of the image and {new} to be written is more than"
                f" the {positions} positions of the LLM: make it shorter"
            )


def as_list(images: Images) -> list[ImageLike]:
    """One image or several, as a list."""
    if isinstance(images, Tensor) or hasattr(images, "ndim"):
        return list(images) if images.ndim == 4 else [images]  # pyright: ignore
    one = isinstance(images, str | bytes | bytearray | memoryview | IOBase | Mapping) or not isinstance(
        images, Iterable
    )
    return [images] if one else list(images)  # pyright: ignore


def check_texts(texts: str | Sequence[str], kind: str) -> list[str]:
    """One text or several, as a list of texts that say something.

    Raises:
        InputError: one is blank, or there are none.
    """
    listed = [texts] if isinstance(texts, str) else list(texts)
    if not listed:
        raise InputError(f"no {kind} was given, expected at least one")
    for number, text in enumerate(listed, 1):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{kind} {number} of {len(listed)} is {text!r}, expected words")
    return listed
