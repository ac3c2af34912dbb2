"""A stage-2 model as a model of lmms-eval: ``lmms-eval --model blip2 --model_args pretrained=runs/mine/vqa``.

lmms-eval finds :data:`MANIFEST` by this package's entry point ``lmms_eval.models``. Nothing else imports this module.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from itertools import count
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

from blip2.config import IMAGE_TOKEN, Precision
from blip2.decoding.options import Decoding
from blip2.errors import InputError
from blip2.pipelines import GenerationPipeline, load

log = logging.getLogger("blip2")

MANIFEST = ModelManifest("blip2", simple_class_path="blip2.evaluation.lmms_eval.Blip2")
"""Tells lmms-eval the name of the model and its class."""
MAX_NEW_TOKENS = 100
"""Maximum number of generated tokens for tasks that set none."""


class Blip2(lmms):
    """A stage-2 model as lmms-eval calls it. The arguments are those of ``--model_args``.

    Args:
        pretrained: the checkpoint; see :func:`blip2.load`.
        device, dtype: how it is loaded; see :func:`blip2.load`. Without a device, each process of ``accelerate launch``
            takes the GPU of its local rank.
        batch_size: number of texts that are generated at the same time.
        prompt: prompt with {} in the place of the task's text, or a prompt without {} that takes its place, such as "a
            photo of". None: the prompt of questions with which the model was trained.

    Raises:
        InputError: the checkpoint cannot be loaded or is not of stage 2, or `batch_size` is not a number.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: Precision | None = None,
        batch_size: int | str = 1,
        prompt: str | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise InputError(f"batch_size is {batch_size!r}, expected a number of texts: give one, such as 16")
        if device in (None, "cuda") and int(os.environ.get("WORLD_SIZE", 1)) > 1 and torch.cuda.is_available():
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        pipeline = load(pretrained, device, dtype)
        if not isinstance(pipeline, GenerationPipeline):
            raise InputError(f"{pretrained} is of stage 1, but lmms-eval needs generated text: give a stage-2 model")
        pipeline.batch_size = int(batch_size)
        self._pipeline, self._prompt = pipeline, prompt
        self._ignored: set[str] = set()

    @property
    def batch_size(self) -> int:
        """Number of texts that are generated at the same time."""
        return self._pipeline.batch_size

    @property
    def device(self) -> torch.device:
        """The device of the model, on which lmms-eval gathers the results of several processes."""
        return self._pipeline.device

    # -- what lmms-eval calls ------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generate a text for each request, with the ``generation_kwargs`` of its task.

        A text about one image is generated in a batch with others that have equal options; a text about several images
        or none as an answer in :meth:`~blip2.GenerationPipeline.chat`.
        """
        texts: dict[int, str] = {}
        single: dict[str, list[tuple[int, Image.Image, str, dict[str, Any]]]] = {}
        with tqdm(total=len(requests), disable=self.rank != 0, desc="blip2") as progress:

            def flush(key: str) -> None:
                numbers, images, contexts, options = zip(*single.pop(key), strict=True)
                texts.update(zip(numbers, self._answer(images, contexts, options[0]), strict=True))
                progress.update(len(numbers))

            for number, request in enumerate(requests):
                context, options, doc_to_visual, *document = request.args
                images = self._images(doc_to_visual, *document)
                if len(images) != 1:
                    texts[number] = self._write(images, context, options)
                    progress.update()
                    continue
                key = json.dumps(options, sort_keys=True)
                single.setdefault(key, []).append((number, images[0], context, options))
                if len(single[key]) == self.batch_size:
                    flush(key)
            for key in list(single):
                flush(key)
        return [texts[number] for number in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[Any]:
        """Return the list of answers to each request of a task whose next question depends on the last answer.

        See :meth:`generate_until`.
        """
        answers: list[list[str]] = []
        for request in tqdm(requests, disable=self.rank != 0, desc="blip2"):
            context, options, doc_to_visual, doc_to_text, *document = request.args
            images, written, info = self._images(doc_to_visual, *document), [], None
            for number in count(1):
                written = [*written, self._write(images, context, options)]
                visuals, context, is_done, written, info = doc_to_text(
                    self._document(*document), previous_output=written, round_idx=number, previous_round_info=info
                )
                if is_done:
                    break
                images = images if visuals is None else self._check_images(visuals, document[1])
            answers.append(list(written))
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether it is the text of greedy search.

        The log-probability is that of the text with its end token, as in :meth:`~blip2.GenerationPipeline.score`: it
        compares answers of which one begins with another.
        """
        results: list[tuple[float, bool]] = []
        for start in tqdm(range(0, len(requests), self.batch_size), disable=self.rank != 0, desc="blip2"):
            images, contexts, targets = [], [], []
            for request in requests[start : start + self.batch_size]:
                if len(request.args) < 6:  # (context, continuation) of acc_mutual_info
                    raise InputError("a request for a likelihood has no image: leave out the metric acc_mutual_info")
                context, target, doc_to_visual, *document = request.args
                found = self._images(doc_to_visual, *document)
                if len(found) != 1:
                    raise InputError(
                        f"the task {document[1]} has a text about {len(found)} images, but only texts about one image"
                        " can be scored: choose another task"
                    )
                images += found
                contexts.append(context)
                targets.append(str(target(self._document(*document)) if callable(target) else target).strip())
            prompts, questions = self._prompts(contexts)
            values = self._pipeline.log_likelihood(images, prompts, targets, questions=questions).tolist()
            longest = max(len(ids) for ids in self._pipeline.tokenizer(targets)["input_ids"])
            greedy = self._answer(images, contexts, {"max_new_tokens": longest + 1})
            results += [(value, text == target) for value, text, target in zip(values, greedy, targets, strict=True)]
        return results

    # -- texts ---------------------------------------------------------------------------------------------------------

    def _document(self, doc_id: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]

    def _images(self, doc_to_visual: Any, doc_id: int, task: str, split: str) -> list[Image.Image]:
        return self._check_images(doc_to_visual(self._document(doc_id, task, split)), task)

    @staticmethod
    def _check_images(visuals: Any, task: str) -> list[Image.Image]:
        visuals = list(visuals or [])
        for each in visuals:
            if not isinstance(each, Image.Image):
                raise InputError(
                    f"the task {task} has a {type(each).__name__} where images were expected: choose a task of images,"
                    " without video or sound"
                )
        return visuals

    def _prompts(self, contexts: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return a prompt and a question per context, without image placeholders."""
        questions = [context.replace(IMAGE_TOKEN, "").strip() for context in contexts]
        return self._pipeline.format_questions(questions, self._prompt), questions

    def _answer(self, images: Sequence[Image.Image], contexts: Sequence[str], options: Mapping[str, Any]) -> list[str]:
        """Generate a text about each image."""
        prompts, questions = self._prompts(contexts)
        tokens = max(len(ids) for ids in self._pipeline.tokenizer(prompts)["input_ids"])
        decoding = self._decoding(options, self._pipeline.model.max_visual_tokens + tokens)
        return self._pipeline.generate(list(images), prompts, decoding, questions=questions)

    def _write(self, images: Sequence[Image.Image], context: str, options: Mapping[str, Any]) -> str:
        """Generate a text about any number of images."""
        if len(images) == 1:
            return self._answer(images, [context], options)[0]
        words = context.split(IMAGE_TOKEN)
        if len(words) != len(images) + 1:  # the text has no places for the images
            words = [*[""] * len(images), "".join(words)]
        parts: list[dict[str, Any]] = []
        for text, image in zip(words, [*images, None], strict=True):
            parts += [{"type": "text", "text": text}] if text else []
            parts += [] if image is None else [{"type": "image", "image": image}]
        chat = self._pipeline.chat(messages=[{"role": "user", "content": parts}], template=self._prompt)
        prompt = chat.encode_prompt(decoding=Decoding(num_beams=1, max_new_tokens=1))
        return chat.ask(decoding=self._decoding(options, prompt.text_embeds.shape[1]))

    def _decoding(self, options: Mapping[str, Any], num_tokens: int) -> Decoding:
        """Return the options of generation in a task's ``generation_kwargs``.

        Args:
            options: the options. As in all of lmms-eval, text is sampled if the temperature is not 0.
            num_tokens: number of tokens before the text. What is generated has to fit into the positions that are left.
        """
        given = {name: value for name, value in options.items() if value is not None}
        until, limit = given.pop("until", []), given.pop("max_new_tokens", MAX_NEW_TOKENS)
        temperature, samples, top_p = given.pop("temperature", 0), given.pop("do_sample", True), given.pop("top_p", 1.0)
        language = self._pipeline.model.language
        if language.max_position_embeddings is not None and not language.is_encoder_decoder:
            limit = max(min(limit, language.max_position_embeddings - num_tokens), 1)
        known = {each.name for each in fields(Decoding)}
        self._warn(set(given) - known)
        stop_strings = [each for each in ([until] if isinstance(until, str) else until) if each]
        more = {name: value for name, value in given.items() if name in known}
        decoding = Decoding(num_beams=1, max_new_tokens=limit, stop_strings=stop_strings or None)
        if not (samples and temperature > 0):
            greedy = {name: value for name, value in more.items() if name not in ("top_k", "min_p")}
            return replace(decoding, **greedy)
        return replace(decoding, top_p=top_p, temperature=temperature, **more)

    def _warn(self, names: set[str]) -> None:
        """Warn once of options of tasks that this model does not have."""
        if new := names - self._ignored:
            self._ignored |= new
            log.warning("generation_kwargs without effect on this model: %s", ", ".join(sorted(new)))
