"""Score texts against images, and what follows from scores: ranking candidates and zero-shot classification.

There are five scores of an image and a text:

======= ===== ===================================================================================================
name    stage value
======= ===== ===================================================================================================
``itc`` 1     cosine of the embeddings, in [-1, 1]: the largest among the queries of the image (§3.2)
``itm`` 1     probability that image and text match, in [0, 1] (§3.2)
``itg`` 1     log-likelihood of the text given the image, under the Q-Former's own language head (§3.2)
``lm``  2     log-likelihood of the text given the image and a prompt, under the LLM (§3.3)
``pmi`` 2     ``lm`` minus the log-likelihood of the same text given a blank image
======= ===== ===================================================================================================

Legend: R rows (an image, or a question about an image), T texts, N pairs of a row and a text, K classes or candidates.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from blip2.config import ScoreName
from blip2.errors import InputError
from blip2.pipelines.base import Images, Model, Pipeline, check_image_index, check_texts

LIKELIHOODS = ("itg", "lm", "pmi")
"""The scores that are sums over the tokens of a text."""


class TextLengthError(InputError):
    """A text, with its prompt, for which the LLM has too few positions."""


@dataclass(frozen=True)
class Scores:
    """Scores of texts for images, from :meth:`~blip2.GenerationPipeline.score`."""

    values: Float[Tensor, "*shape"]
    """[R, T] for every image with every text, [N] for pairs. A likelihood is the sum over the tokens of the text, in
    natural logarithms."""
    num_tokens: Int[Tensor, "*shape"] | None = None
    """Number of tokens of each text, with its end token. None: the score is not a likelihood."""

    @property
    def per_token(self) -> Float[Tensor, "*shape"]:
        """The likelihoods divided by the numbers of tokens.

        Raises:
            InputError: the scores are not likelihoods.
        """
        if self.num_tokens is None:
            raise InputError("these scores are not sums over tokens: use .values, or by='itg', 'lm' or 'pmi'")
        return self.values / self.num_tokens


@dataclass(frozen=True)
class Candidate:
    """A text among the candidates for an image, with its score."""

    text: str
    score: float
    """The score by which the candidates were ranked."""
    probability: float
    """Probability of the text if exactly one of the candidates is right, in [0, 1]."""


class Rows(NamedTuple):
    """The images that are scored, each with the prompt and the question with which a text is compared."""

    features: Float[Tensor, "I P E"]
    image_index: list[int]
    """The image of each row."""
    prompts: list[str] | None = None
    """The prompt of each row, for a model with an LLM."""
    questions: list[str] | None = None
    """The question of each row. None: there are no questions."""

    def __len__(self) -> int:
        return len(self.image_index)


class ScoringPipeline(Pipeline[Model]):
    """The methods of both stages that use scores. Each stage defines how a pair is scored."""

    score_names: ClassVar[tuple[ScoreName, ...]]
    """The scores of this stage, the default first."""

    @torch.no_grad()
    def score(
        self,
        images: Images,
        texts: str | Sequence[str],
        by: ScoreName | str | None = None,
        *,
        pairs: bool = False,
        image_index: Sequence[int] | None = None,
        prompt: str | Sequence[str] | None = None,
        questions: str | Sequence[str] | None = None,
    ) -> Scores:
        """Score texts against images.

        An image is encoded once, and its keys and values in the Q-Former are shared by all texts. An LLM reads a prompt
        once for all texts that follow it.

        Args:
            images: images. With several questions or prompts, a single image is used for all of them.
            texts: texts. For ``itc``, ``itm`` and ``itg`` they are normalized and truncated as in
                :meth:`RepresentationPipeline.tokenize`. For ``lm`` and ``pmi`` they are normalized as the captions of
                the training data unless there are questions, and never truncated; their end token counts as a token of
                the text.
            by: the score (:mod:`blip2.pipelines.scoring`): ``itc``, ``itm`` or ``itg`` for stage 1, ``lm`` or ``pmi``
                for stage 2. None: ``itm`` for stage 1, ``lm`` for stage 2. The blank image of ``pmi`` has the mean
                color of the image encoder's preprocessing: after normalization, all its pixels are 0. For a model that
                reads arrays of features it is one token of zeros.
            pairs: whether text i is compared with image i only.
            image_index: the index of the image of each text, if texts are compared with one image each and several may
                be about the same image. With several questions or prompts about a single image, it is the index of the
                question or prompt.
            prompt: stage 2 only: text that each text continues: one for all images, or one per image. With `questions`:
                a prompt with {} in the place of the question. None: the prompt with which the model was trained.
            questions: stage 2 only: a question that each text answers: one for all images, or one per image. The prompt
                is then the model's prompt of questions unless `prompt` is given, and a Q-Former that reads questions
                reads it.

        Returns:
            :class:`Scores` of every image with every text, [R, T]; with `pairs` or `image_index` those of the N texts,
            [N]. R is the number of images, or of questions or prompts if there is a single image.

        Raises:
            InputError: the model has no such score; there are no images or texts; an image cannot be decoded; a text is
                blank or too long for the LLM; numbers of images, texts, questions or prompts do not fit together.
        """
        name = self._check_score(by)
        listed = check_texts(texts, "text")
        rows = self._make_rows(images, prompt, questions)
        if not pairs and image_index is None:
            return self._score(name, rows, listed, None)
        indices = self._check_pairs(len(rows), len(listed), pairs, image_index)
        return self._score(name, rows, listed, (torch.tensor(indices), torch.arange(len(listed))))

    @torch.no_grad()
    def rank(
        self,
        images: Images,
        candidates: Sequence[str] | Sequence[Sequence[str]],
        questions: str | Sequence[str] | None = None,
        by: ScoreName | str | None = None,
        *,
        prompt: str | Sequence[str] | None = None,
        per_token: bool = False,
    ) -> list[list[Candidate]]:
        """Rank candidate texts for images, or candidate answers to questions about images (multiple choice).

        Args:
            images: images. With several questions or prompts, a single image is used for all of them.
            candidates: texts for all images, or one list of texts per image (per question, if there are several).
            questions: stage 2 only: a question that the candidates answer: one for all images, or one per image.
            by: the score, see :meth:`score`.
            prompt: stage 2 only: text that each candidate continues, see :meth:`score`.
            per_token: whether to rank by the likelihood per token, which does not prefer short texts, instead of the
                likelihood of the whole text.

        Returns:
            For each image, or each question if there are several, all its candidates, the best first; equal candidates
            keep their order. The probabilities of the candidates of an image sum to 1. They are the softmax of the
            likelihoods by which they are ranked, or of the cosines divided by the model's temperature (``itc``), or the
            probabilities of a match divided by their sum (``itm``). If the model is calibrated for `by`, they are the
            calibrated probabilities, except with `per_token` (docs/calibration.md).

        Raises:
            InputError: as :meth:`score`; or the score is not a likelihood, so that there are no tokens to divide by.
        """
        name = self._check_score(by)
        if per_token and name not in LIKELIHOODS:
            raise InputError(
                f"per_token divides a likelihood by the number of tokens, but {name} is not one: rank by"
                f" {' or '.join(each for each in self.score_names if each in LIKELIHOODS)}, or leave out per_token"
            )
        rows = self._make_rows(images, prompt, questions)
        shared, groups = self._group_candidates(candidates, len(rows))
        if shared is not None:
            scores = self._score(name, rows, shared, None)
            values = list(scores.per_token if per_token else scores.values)
        else:
            sizes = [len(group) for group in groups]
            row_index = torch.arange(len(rows)).repeat_interleave(torch.tensor(sizes))
            flat = [text for group in groups for text in group]
            scores = self._score(name, rows, flat, (row_index, torch.arange(len(flat))))
            values = list((scores.per_token if per_token else scores.values).split(sizes))
        return [self._order(name, group, each, per_token) for group, each in zip(groups, values, strict=True)]

    @torch.no_grad()
    def classify(
        self,
        images: Images,
        classes: Sequence[str],
        template: str | Sequence[str] | None = None,
        by: ScoreName | str | None = None,
        *,
        prompt: str | Sequence[str] | None = None,
        questions: str | Sequence[str] | None = None,
    ) -> list[list[Candidate]]:
        """Classify images without training (zero-shot): rank the names of classes.

        Several templates are an ensemble. By ``itc``, the embedding of a class is the normalized mean of the embeddings
        of its texts; otherwise the score of a class is the mean of the scores of its texts.

        Args:
            images: images.
            classes: names of the classes.
            template: text about an image of a class, with {} in the place of the name; one or several. None:
                :attr:`class_template`, or the name alone if there are questions.
            by: the score, see :meth:`score`.
            prompt: stage 2 only: text that each text continues, see :meth:`score`.
            questions: stage 2 only: a question that the classes answer, see :meth:`score`.

        Returns:
            For each image, all classes, the most probable first; see :meth:`rank`.

        Raises:
            InputError: as :meth:`score`; or a template does not contain {}.
        """
        name = self._check_score(by)
        if template is None:
            template = self.class_template if questions is None else "{}"
        templates, listed = check_texts(template, "template"), check_texts(classes, "class")
        without = next((each for each in templates if "{}" not in each), None)
        if without is not None:
            raise InputError(f"the template {without!r} has no {{}}: put {{}} in the place of the class's name")
        rows = self._make_rows(images, prompt, questions)
        texts = [each.replace("{}", label) for label in listed for each in templates]
        values = self._ensemble_scores(name, rows, texts, len(templates))
        return [self._order(name, listed, each) for each in values]

    @property
    @abstractmethod
    def class_template(self) -> str:
        """The default template of :meth:`classify`."""

    # -- what each stage defines ---------------------------------------------------------------------------------------

    @abstractmethod
    def _make_rows(
        self, images: Images, prompt: str | Sequence[str] | None, questions: str | Sequence[str] | None
    ) -> Rows:
        """Encode the images, and give each its prompt and its question."""

    @abstractmethod
    def _score(
        self,
        by: ScoreName,
        rows: Rows,
        texts: list[str],
        pairs: tuple[Int[Tensor, "N"], Int[Tensor, "N"]] | None,
    ) -> Scores:
        """Score texts.

        Args:
            by: one of :attr:`score_names`.
            rows: the R rows.
            texts: T texts.
            pairs: row and text of each pair. None: every row with every text, in an array [R, T].
        """

    def _ensemble_scores(self, by: ScoreName, rows: Rows, texts: list[str], size: int) -> Float[Tensor, "R K"]:
        """Return the scores of classes.

        Args:
            by: one of :attr:`score_names`.
            rows: the R rows.
            texts: `size` texts of the first class, then of the second class and so on.
            size: number of templates.
        """
        return self._score(by, rows, texts, None).values.unflatten(1, (-1, size)).mean(dim=2)

    def _choice_logits(self, by: ScoreName, scores: Float[Tensor, "K"]) -> Float[Tensor, "K"]:
        """Return logits whose softmax gives the candidates' probabilities."""
        return scores

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _order(
        self, by: ScoreName, texts: Sequence[str], scores: Float[Tensor, "K"], per_token: bool = False
    ) -> list[Candidate]:
        logits, temperature = self._choice_logits(by, scores), self._temperature(by)
        # The scores of ITM are calibrated probabilities already; the temperature of a likelihood is that of its sum.
        if temperature is not None and by != "itm" and not per_token:
            logits = logits / temperature
        probabilities = logits.softmax(dim=0).tolist()
        values = scores.tolist()
        order = sorted(range(len(texts)), key=lambda i: -values[i])
        return [Candidate(texts[i], values[i], probabilities[i]) for i in order]

    def _check_score(self, by: ScoreName | str | None) -> ScoreName:
        """Return the score to compute, after checking that this stage has it."""
        found: ScoreName | None = next((name for name in self.score_names if by in (name, None)), None)
        if found is not None:
            return found
        if by not in get_args(ScoreName):
            raise InputError(f"by is {by!r}, expected one of {', '.join(get_args(ScoreName))}")
        other = "generation" if self.config.stage == "representation" else "representation"
        raise InputError(
            f"{self.path} is of stage {self.config.stage}, which cannot score by {by}: use"
            f" {' or '.join(self.score_names)}, or load a model of stage {other}"
        )

    @staticmethod
    def _check_pairs(num_rows: int, num_texts: int, pairs: bool, image_index: Sequence[int] | None) -> list[int]:
        """Return the index of the row of each text."""
        if image_index is None:
            if num_rows != num_texts:
                raise InputError(
                    f"there are {num_rows} images and {num_texts} texts, but pairs need equal numbers: give one text"
                    " per image, or leave out pairs to compare every image with every text"
                )
            return list(range(num_texts))
        if pairs:
            raise InputError("found both pairs and image_index, expected one of them: leave out pairs")
        indices = list(image_index)
        if len(indices) != num_texts:
            raise InputError(f"image_index has {len(indices)} entries for {num_texts} texts: give one per text")
        return check_image_index(indices, num_rows)

    @staticmethod
    def _group_candidates(
        candidates: Sequence[str] | Sequence[Sequence[str]], num_rows: int
    ) -> tuple[list[str] | None, list[list[str]]]:
        """Return the candidates of all rows if they are the same (else None), and the candidates of each row."""
        items = [candidates] if isinstance(candidates, str | bytes) else list(candidates)
        if not any(isinstance(item, list | tuple) for item in items):
            shared = check_texts(items, "candidate")  # pyright: ignore[reportArgumentType]
            return shared, [shared] * num_rows
        if len(items) != num_rows:
            raise InputError(
                f"there are {len(items)} lists of candidates for {num_rows} images or questions: give one list for"
                " each, or one list of texts for all"
            )
        return None, [check_texts(item, "candidate") for item in items]
