"""Engines, which run the models: their interface, and the engine that runs them in this process.

All passes of all models are made by one thread. Requests that arrive while it works are batched into the next pass:
images, texts and pairs by kind, and the texts that an LLM generates token by token, where complete texts leave the
batch and new ones join it between two tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from anyio import to_thread
from openai.types.chat import ChatCompletionTokenLogprob
from transformers import PreTrainedTokenizerBase

from blip2.backbones.language import LanguageModel
from blip2.decoding.continuous import ContinuousBatch, NewToken, Row
from blip2.decoding.kv_cache import PromptBatch, UncachedDecoder
from blip2.decoding.options import Decoding
from blip2.decoding.search import cached_decoder_class
from blip2.decoding.text import TextStreamer
from blip2.pipelines import GenerationPipeline
from blip2.serve.errors import ApiError
from blip2.serve.metrics import Metrics
from blip2.serve.tokens import ShownTokens

Item = TypeVar("Item")
Result = TypeVar("Result")
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Generation:
    """Texts to generate for one prompt."""

    pipeline: GenerationPipeline
    prompt: PromptBatch
    """A batch of one prompt."""
    decoding: Decoding
    """Options of text generation, without beam search."""
    n: int = 1
    """Number of texts."""
    seed: int | None = None
    """Seed of sampling. None: a random one."""
    num_alternatives: int | None = None
    """Number of most likely tokens to return for each token. None: no probabilities."""


@dataclass(frozen=True)
class Piece:
    """The next piece of one of the texts."""

    index: int
    """Number of the text, in [0, n)."""
    text: str
    """The piece, which may be empty."""
    token_ids: tuple[int, ...]
    """Tokens of the text that were generated since its last piece, with the end token and those of a stop string."""
    log_probs: tuple[ChatCompletionTokenLogprob, ...] = ()
    """The tokens that have become visible with this piece, with their probabilities, if requested. The tokens of all
    pieces are those of the whole text."""
    finish_reason: FinishReason | None = None
    """Why the text ends here: ``stop`` at its end token or a stop string, ``length`` at its maximum length. None: it
    goes on."""


class Engine(ABC):
    """Runs models."""

    @abstractmethod
    async def submit(self, function: Callable[[list[Item]], Sequence[Result]], items: Sequence[Item]) -> list[Result]:
        """Return the results of a function for items, together with those of other requests.

        Args:
            function: maps items to their results, which do not depend on each other. Items of all requests that give
                an equal function are passed to it in one list.
            items: the items of this request.
        """

    @abstractmethod
    def check_n(self, n: int) -> None:
        """Raise an ApiError if `n` texts cannot be generated for one prompt."""

    @abstractmethod
    def stream(self, generation: Generation) -> AsyncGenerator[Piece, None]:
        """Generate texts, and yield their pieces as they are written. If the iterator is closed, the work ends."""

    @abstractmethod
    def is_ready(self) -> bool:
        """Return whether requests will be answered."""

    @abstractmethod
    async def close(self) -> None:
        """Finish what was submitted, and free what the engine holds."""


@dataclass(eq=False)
class _Call:
    """Items that wait for a function."""

    function: Callable[[list[Any]], Sequence[Any]]
    items: Sequence[Any]
    future: Future[list[Any]]


@dataclass(eq=False)
class _Job:
    """A generation with its rows."""

    generation: Generation
    rows: list[Row]
    publish: Callable[[list[NewToken] | Exception], None]
    streamers: list[TextStreamer] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return all(row.is_done for row in self.rows)


class LocalEngine(Engine):
    """Runs the models in a thread of this process; see the description of the module.

    Args:
        max_batch_size: maximum number of texts that are generated at the same time with one LLM, and of items in a
            pass.
        metrics: counts passes and tokens. None: nothing is counted.
    """

    def __init__(self, max_batch_size: int = 16, metrics: Metrics | None = None) -> None:
        self._max_batch_size, self._metrics = max_batch_size, metrics or Metrics()
        self._condition = threading.Condition()
        self._calls: deque[_Call] = deque()
        self._waiting: deque[_Job] = deque()
        self._running: dict[int, _Running] = {}  # by the id of the pipeline
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="blip2-engine", daemon=True)
        self._thread.start()

    async def submit(self, function: Callable[[list[Item]], Sequence[Result]], items: Sequence[Item]) -> list[Result]:
        if not items:
            return []
        future: Future[list[Result]] = Future()
        self._put(self._calls, _Call(function, items, future))
        return await asyncio.wrap_future(future)

    def check_n(self, n: int) -> None:
        if n > self._max_batch_size:
            raise ApiError(
                400,
                f"n is {n}, but at most {self._max_batch_size} texts are generated at the same time: ask for fewer",
                "n",
            )

    async def stream(self, generation: Generation) -> AsyncGenerator[Piece, None]:
        self.check_n(generation.n)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[list[NewToken] | Exception] = asyncio.Queue()
        job = _Job(generation, make_rows(generation), lambda event: _publish(loop, events, event))
        tokenizer = generation.pipeline.tokenizer
        stop_strings = generation.decoding.stop_strings
        texts = [_Text(tokenizer, stop_strings, generation) for _ in job.rows]
        self._put(self._waiting, job)
        try:
            open_texts = len(texts)
            while open_texts:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                for new in event:
                    index = job.rows.index(new.row)
                    piece = texts[index].add(new, index)
                    if piece is None:
                        continue
                    if piece.finish_reason is not None:
                        new.row.is_done = True
                        open_texts -= 1
                    yield piece
        finally:
            for row in job.rows:  # the thread drops them before the next token
                row.is_done = True

    def is_ready(self) -> bool:
        return self._thread.is_alive() and not self._is_closed

    async def close(self) -> None:
        with self._condition:
            self._is_closed = True
            self._condition.notify()
        await to_thread.run_sync(self._thread.join)

    def _put(self, queue: deque[Any], what: Any) -> None:
        with self._condition:
            if self._is_closed:
                raise RuntimeError("the engine is closed")
            queue.append(what)
            self._condition.notify()

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while self._wait():
            self._take_turn()  # a function, so that nothing of it is kept in memory while the thread waits

    def _wait(self) -> bool:
        """Wait for work; return False if there is none and the engine is closed."""
        with self._condition:
            self._condition.wait_for(lambda: self._has_work() or self._is_closed)
            return self._has_work()

    def _has_work(self) -> bool:
        return bool(self._calls or self._waiting or self._running)

    def _take_turn(self) -> None:
        """Run one batch of calls, and generate a token of each text."""
        with self._condition:
            calls, jobs = self._take_calls(), self._take_jobs()
        if calls:
            self._run_calls(calls)
        self._join(jobs)
        for key, running in list(self._running.items()):
            try:
                self._metrics.tokens.inc(running.step())
            except Exception as error:
                running.fail(error)
                del self._running[key]
                continue
            if not len(running):
                del self._running[key]
        self._metrics.rows.set(sum(len(each) for each in self._running.values()))

    def _take_calls(self) -> list[_Call]:
        """Return the oldest call, and those that can be made in the same batch."""
        while self._calls and not self._calls[0].future.set_running_or_notify_cancel():
            self._calls.popleft()
        if not self._calls:
            return []
        chosen = [self._calls.popleft()]
        size = len(chosen[0].items)
        for call in list(self._calls):
            if call.function == chosen[0].function and size + len(call.items) <= self._max_batch_size:
                self._calls.remove(call)
                if call.future.set_running_or_notify_cancel():
                    chosen.append(call)
                    size += len(call.items)
        return chosen

    def _run_calls(self, calls: list[_Call]) -> None:
        items = [item for call in calls for item in call.items]
        self._metrics.batch.observe(len(items))
        try:
            results = list(calls[0].function(items))
        except Exception as error:
            if len(calls) == 1:
                calls[0].future.set_exception(error)
                return
            for call in calls:  # the fault of one request must not be that of the others
                self._run_calls([call])
            return
        for call in calls:
            call.future.set_result(results[: len(call.items)])
            results = results[len(call.items) :]

    def _take_jobs(self) -> list[_Job]:
        """Return the oldest generations for which there is room."""
        room: dict[int, int] = {}
        taken: list[_Job] = []
        for job in list(self._waiting):
            key = id(job.generation.pipeline)
            running = len(self._running[key]) if key in self._running else 0
            room.setdefault(key, self._max_batch_size - running)
            if job.is_done:  # the client has left
                self._waiting.remove(job)
            elif len(job.rows) <= room[key]:
                room[key] -= len(job.rows)
                self._waiting.remove(job)
                taken.append(job)
            else:
                room[key] = 0  # those behind it wait too
        return taken

    def _join(self, jobs: list[_Job]) -> None:
        for job in jobs:
            pipeline = job.generation.pipeline
            try:
                if id(pipeline) not in self._running:
                    self._running[id(pipeline)] = _Running(pipeline)
                self._running[id(pipeline)].pending.append(job)
            except Exception as error:
                job.publish(error)
        for running in self._running.values():
            running.join()


class _Running:
    """The texts that one LLM generates at the moment."""

    def __init__(self, pipeline: GenerationPipeline) -> None:
        self._language: LanguageModel = pipeline.model.language
        self._device = pipeline.device
        network = self._language.network
        has_cache = self._language.has_kv_cache
        decoder_class = cached_decoder_class(network) if has_cache else UncachedDecoder
        self._batch = ContinuousBatch(decoder_class, network, self._language.eos_token_ids(pipeline.eos_token_id))
        self._jobs: dict[Row, _Job] = {}
        self.pending: list[_Job] = []

    def __len__(self) -> int:
        return len(self._batch)

    def join(self) -> None:
        jobs, self.pending = self.pending, []
        if not jobs:
            return
        try:
            self._add(jobs)
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].publish(error)
                return
            for job in jobs:
                self.pending = [job]
                self.join()

    def _add(self, jobs: list[_Job]) -> None:
        with self._language.autocast_context(self._device):
            self._batch.join([job.generation.prompt for job in jobs], [job.rows for job in jobs])
        self._jobs |= {row: job for job in jobs for row in job.rows}

    def step(self) -> int:
        """Add a token to each text, and return the number of tokens."""
        with self._language.autocast_context(self._device):
            new = self._batch.choose()
        by_job: dict[_Job, list[NewToken]] = {}
        for each in new:
            by_job.setdefault(self._jobs[each.row], []).append(each)
        for job, tokens in by_job.items():
            job.publish(tokens)
        with self._language.autocast_context(self._device):
            self._batch.advance()
        self._jobs = {row: job for row, job in self._jobs.items() if not row.is_done}
        return len(new)

    def fail(self, error: Exception) -> None:
        """End all texts with an error. The object must not be used after it."""
        for job in dict.fromkeys(self._jobs.values()):
            job.publish(error)


class _Text:
    """The text of a row, made from its tokens."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str] | None, generation: Generation
    ) -> None:
        self._tokenizer, self._stop_strings = tokenizer, tuple(stop_strings or ())
        self._streamer, self._shown = TextStreamer(tokenizer, stop_strings), ShownTokens(tokenizer)
        self._eos = generation.pipeline.model.language.eos_token_ids(generation.pipeline.eos_token_id)
        self._limit = generation.decoding.max_new_tokens
        self._tokens: list[int] = []
        self._is_done = False

    def add(self, new: NewToken, index: int) -> Piece | None:
        """Return the next piece of the text; None if the text has ended before this token."""
        if self._is_done:
            return None
        self._tokens.append(new.token)
        reason: FinishReason | None = None
        if new.token in self._eos or (self._stop_strings and self._has_stop_string()):
            reason = "stop"
        elif len(self._tokens) == self._limit:
            reason = "length"
        self._is_done = reason is not None
        text = self._streamer.put(self._tokens) if reason is None else self._streamer.end(self._tokens)
        if new.log_prob is None:
            return Piece(index, text, (new.token,), finish_reason=reason)
        self._shown.add(new.token, new.log_prob, new.alternatives)
        return Piece(index, text, (new.token,), self._shown.take(self._streamer.text), reason)

    def _has_stop_string(self) -> bool:
        text = str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))
        return any(each in text for each in self._stop_strings)


def make_rows(generation: Generation) -> list[Row]:
    """Return the texts of a generation. With a seed, they do not depend on what else is generated."""
    decoding, count = generation.decoding, generation.n
    uniforms = None
    if decoding.do_sample:
        generator = torch.Generator()
        if generation.seed is None:
            generator.seed()
        else:
            generator.manual_seed(generation.seed)
        uniforms = torch.rand(count, decoding.max_new_tokens, generator=generator)
    return [Row(decoding, None if uniforms is None else uniforms[i], generation.num_alternatives) for i in range(count)]


def _publish(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Any], event: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
        loop.call_soon_threadsafe(events.put_nowait, event)
