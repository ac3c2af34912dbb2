"""The tokens of a text as ``logprobs`` lists them."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from typing import Any

from openai.types.chat import ChatCompletionTokenLogprob
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from blip2.decoding.text import INCOMPLETE_CHARACTER

BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
"""The byte for which each character stands in the vocabulary of a byte-level tokenizer."""


class ShownTokens:
    """The tokens of a text that is generated, each with its log-probability, as far as the client sees their text.

    A client gets a text up to its first stop string and without white space at both ends. A token is listed as soon as
    the client has a character of it; the end token, the tokens of a stop string and those of white space at the ends
    never are.

    Args:
        tokenizer: tokenizer of the LLM.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._text = ""
        self._held: deque[tuple[int, int, ChatCompletionTokenLogprob]] = deque()  # with start and end in the text

    def add(self, token: int, log_prob: float, alternatives: Iterable[tuple[int, float]]) -> None:
        """Add the next token of the text.

        Args:
            token: the token.
            log_prob: natural logarithm of its probability.
            alternatives: the most likely tokens and their log-probabilities, the most likely first.
        """
        self._tokens.append(token)
        before, self._text = self._text, str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))
        if not self._text.startswith(before):  # the token completes a character
            before = before.rstrip(INCOMPLETE_CHARACTER)
        best = [TopLogprob(**describe_token(self._tokenizer, other), logprob=value) for other, value in alternatives]
        chosen = describe_token(self._tokenizer, token)
        listed = ChatCompletionTokenLogprob(**chosen, logprob=log_prob, top_logprobs=best)
        self._held.append((len(before), len(self._text), listed))

    def take(self, shown: str) -> tuple[ChatCompletionTokenLogprob, ...]:
        """Return the tokens that have become visible since the last call.

        Args:
            shown: all of the text that the client has now.
        """
        first = len(self._text) - len(self._text.lstrip())
        taken: list[ChatCompletionTokenLogprob] = []
        while shown and self._held and self._held[0][0] < first + len(shown):
            start, end, listed = self._held.popleft()
            if max(start, first) < end:
                taken.append(listed)
        return tuple(taken)


def describe_token(tokenizer: PreTrainedTokenizerBase, token: int) -> dict[str, Any]:
    """Return the text and the bytes of a token. The bytes are None if they are a part of a character and unknown."""
    text = str(tokenizer.decode([token]))
    found: list[int] | None = list(text.encode())
    if INCOMPLETE_CHARACTER in text:  # a part of a character, whose other bytes are in the adjacent tokens
        name = str(tokenizer.convert_ids_to_tokens(token))
        if match := re.fullmatch("<0x([0-9A-F]{2})>", name):
            found = [int(match[1], 16)]
        else:
            found = [BYTES[each] for each in name] if all(each in BYTES for each in name) else None
    return {"token": text, "bytes": found}
