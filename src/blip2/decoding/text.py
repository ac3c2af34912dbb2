"""The text of generated tokens: stop strings, and text that is shown while it is generated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase, StoppingCriteria, StopStringCriteria

from blip2.decoding.options import Decoding
from blip2.errors import InputError

INCOMPLETE_CHARACTER = "\ufffd"
"""The character in whose place a tokenizer decodes bytes that are not, or not yet, a character in UTF-8."""


def make_stopping_criteria(tokenizer: PreTrainedTokenizerBase, decoding: Decoding) -> StoppingCriteria | None:
    """Return transformers' ``StopStringCriteria`` for ``decoding.stop_strings``, or None if there are none.

    Raises:
        InputError: no token of the LLM can end one of the stop strings.
    """
    if not decoding.stop_strings:
        return None
    stop_strings = list(decoding.stop_strings)
    try:
        return StopStringCriteria(tokenizer, stop_strings)
    except ValueError as error:
        raise InputError(
            f"stop_strings is {stop_strings!r}, but the LLM has no tokens for one of them: use other characters"
        ) from error


def final_text(text: str, stop_strings: Sequence[str] | None) -> str:
    """Return a generated text up to the first stop string, without white space around it."""
    ends = [end for each in stop_strings or () if (end := text.find(each)) >= 0]
    return text[: min(ends, default=len(text))].strip()


class TextStreamer:
    """Turns the tokens of a sequence, as they are generated, into pieces of its text.

    The pieces together are the text that :func:`final_text` makes from the whole sequence. A piece never ends within a
    character. Text that can still change is held back: the possible beginning of a stop string, and white space, which
    may be the end of the text.

    Args:
        tokenizer: tokenizer of the LLM.
        stop_strings: texts that end the sequence. None: there are none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str] | None) -> None:
        self._tokenizer, self._stop_strings = tokenizer, tuple(stop_strings or ())
        self.text = ""
        """The pieces so far."""

    def put(self, tokens: Sequence[int]) -> str:
        """Return the next piece, which may be empty.

        Args:
            tokens: all tokens of the sequence so far.
        """
        text = self._decode(tokens)
        if not any(each in text for each in self._stop_strings):
            text = text.rstrip(INCOMPLETE_CHARACTER)
            held = max((_overlap(text, each) for each in self._stop_strings), default=0)
            text = text[: len(text) - held]
            if getattr(self._tokenizer, "clean_up_tokenization_spaces", False):
                # The tokenizer removes spaces before punctuation, so the last word can still move.
                text = text[: max(text.rfind(" "), 0)]
        return self._advance(final_text(text, self._stop_strings))

    def end(self, tokens: Sequence[int]) -> str:
        """Return the last piece, which may be empty.

        Args:
            tokens: all tokens of the sequence.
        """
        return self._advance(final_text(self._decode(tokens), self._stop_strings))

    def pieces(self, steps: Iterable[Sequence[int]]) -> Iterator[str]:
        """Yield the pieces that are not empty.

        Args:
            steps: all tokens of the sequence so far, after each token.
        """
        tokens: Sequence[int] = ()
        for tokens in steps:
            if piece := self.put(tokens):
                yield piece
        if piece := self.end(tokens):
            yield piece

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def _advance(self, text: str) -> str:
        piece = text[len(self.text) :]
        self.text += piece
        return piece


def _overlap(text: str, stop_string: str) -> int:
    """Return the length of the longest end of a text with which a stop string begins."""
    longest = min(len(text), len(stop_string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop_string[:n])), 0)
