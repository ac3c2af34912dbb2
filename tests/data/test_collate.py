from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from blip2.backbones.vision import Preprocessing
from blip2.data.collate import (
    CausalLMCollator,
    Collator,
    PrefixLMCollator,
    Stage1Collator,
    StageBatch,
    check_prompt,
    encode_continuations,
    encode_prompts,
    encode_texts,
    normalize_captions,
    normalize_questions,
    pad,
    split_caption,
)
from blip2.errors import InputError
from blip2.model.generation import GenerationBatch
from blip2.model.losses import IGNORE_INDEX
from blip2.model.representation import RepresentationBatch
from conftest import Parts, byte_tokenizer

PREPROCESSING = Preprocessing(8)
END = 256  # of the byte tokenizers
LONG = " ".join(["word"] * 10_000)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """One whose tokens begin with the space before a word, as GPT-2's and OPT's do; a token a known word."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["a photo of two dogs and a cat"] * 10, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    assert len(tokenizer(" dogs")["input_ids"]) == 1
    return tokenizer


@pytest.fixture(scope="module", params=["llama", "opt", "t5", "merging"])
def tokenizer(request: pytest.FixtureRequest, parts: Parts) -> PreTrainedTokenizerBase:
    """Bytes as tokens: as it is, with a token before the text, with one behind it; and one that merges."""
    if request.param == "merging":
        return merging_tokenizer()
    return AutoTokenizer.from_pretrained(getattr(parts, request.param))


WORDS = [f"w{n}" for n in range(60)]
NORMALIZED = [
    # text, as LAVIS's blip_caption makes it, as its blip_question does
    ("A Cat.", "a cat", "a cat"),
    ('"Two" dogs (and a CAT)!', "two dogs and a cat", "two dogs and a cat"),
    ("What's this?", "what's this?", "what's this?"),
    ("red:blue;green~#1 *new*", "red blue green 1 new", "redbluegreen1 new"),
    ("  Is   it,  really - so?  ", "is it, really - so?", "  is   it,  really - so?"),
    ("one\ttwo", "one\ttwo", "one\ttwo"),
    ("one \n two\n", "one two", "one \n two\n"),
    ("a. b.. c...", "a b c", "a b c"),
    ("ÉCOLE № 3.", "école № 3", "école № 3"),
    ("it is 3.5 m", "it is 3 5 m", "it is 35 m"),
    ("!!!", "", ""),
    ("", "", ""),
    (" ".join(WORDS), " ".join(WORDS[:50]), " ".join(WORDS[:50])),
    ("a  " * 60, " ".join(["a"] * 50), ("a  " * 25).removesuffix(" ")),
    (" ".join(WORDS[:50]) + " .", " ".join(WORDS[:50]), " ".join(WORDS[:50])),
]
"""Written down from the rules of LAVIS's processors, word by word."""


@pytest.mark.parametrize(("text", "caption", "question"), NORMALIZED)
def test_text_normalization_is_lavis_s(text: str, caption: str, question: str) -> None:
    assert normalize_captions([text, text], "lavis") == [caption, caption]
    assert normalize_questions([text], "lavis") == [question]
    assert normalize_captions([text], "none") == normalize_questions([text], "none") == [text]


def test_captions_and_questions_are_normalized_and_answers_and_prompts_are_not(parts: Parts) -> None:
    tokenizer = AutoTokenizer.from_pretrained(parts.llama)
    reader = AutoTokenizer.from_pretrained(parts.bert)

    def read(row: torch.Tensor) -> str:
        return tokenizer.decode(row[row >= 0], skip_special_tokens=True)

    given = ["A Dog.", "Left, Mr. Y."], ["", "Which WAY (is it)?"], torch.arange(2), np.random.default_rng(0)
    for how, caption, question in (("none", "A Dog.", "Which WAY (is it)?"), ("lavis", "a dog", "which way is it?")):
        texts = CausalLMCollator(tokenizer, 32, "A Photo.", END, reader, "Q: {} A.", normalization=how)
        batch, _ = texts(torch.zeros(2, 3, 8, 8), *given)
        assert [read(row) for row in batch.ids] == [f"A Photo. {caption}", f"Q: {question} A. Left, Mr. Y."]
        assert batch.questions is not None
        assert torch.equal(batch.questions.ids, encode_texts(reader, ["", question], 40)[0])
        prefix = PrefixLMCollator(AutoTokenizer.from_pretrained(parts.t5), 32, "", END, normalization=how)
        batch, _ = prefix(torch.zeros(1, 3, 8, 8), ["One TWO."], [""], torch.arange(1), np.random.default_rng(0))
        written = [read(batch.ids[0]), read(batch.labels[0])]
        assert written == (["One", "TWO."] if how == "none" else ["one", "two"])
        first = Stage1Collator(reader, 32, how)
        batch, _ = first(torch.zeros(1, 3, 8, 8), ["a. (b)"], [""], torch.arange(1), np.random.default_rng(0))
        assert torch.equal(batch.ids, encode_texts(reader, ["a. (b)" if how == "none" else "a b"], 32)[0])


def test_a_question_of_signs_alone_is_still_asked(parts: Parts) -> None:
    texts = CausalLMCollator(
        AutoTokenizer.from_pretrained(parts.llama), 32, "", END, None, "Q: {} A:", normalization="lavis"
    )
    batch, _ = texts(torch.zeros(1, 3, 8, 8), ["no"], ["..."], torch.arange(1), np.random.default_rng(0))
    assert texts.tokenizer.decode(batch.ids[0], skip_special_tokens=True) == "Q:  A: no"


def test_texts_are_padded_to_the_longest(bert: PreTrainedTokenizerBase) -> None:
    texts = ["ab c", "", "abcdef"]
    ids, mask, cut = encode_texts(bert, texts, 32)
    assert (ids.shape, cut) == ((3, 8), 0)
    assert mask.sum(dim=1).tolist() == [5, 2, 8]
    assert (ids[~mask] == bert.pad_token_id).all()
    for row, real, text in zip(ids, mask, texts, strict=True):
        assert bert.convert_ids_to_tokens(row[real].tolist()) == ["[CLS]", *bert.tokenize(text), "[SEP]"]


@pytest.mark.parametrize(("text", "tokens", "cut"), [("abcdef", 8, 0), ("abcdefg", 8, 1), (LONG, 8, 1)])
def test_long_texts_are_cut_and_keep_their_end(bert: PreTrainedTokenizerBase, text: str, tokens: int, cut: int) -> None:
    ids, mask, found = encode_texts(bert, [text], 8)
    assert found == cut
    assert mask.tolist() == [[True] * tokens]
    assert bert.convert_ids_to_tokens(ids[0].tolist()) == ["[CLS]", *bert.tokenize(text)[:6], "[SEP]"]


@pytest.mark.parametrize("prompt", ["", "a photo of"])
def test_continuations_carry_loss_on_caption_and_end(tokenizer: PreTrainedTokenizerBase, prompt: str) -> None:
    captions = ["a cat", "two dogs and a cat", "ein Café mit 猫"]
    end = tokenizer.eos_token_id
    ids, mask, labels, cut = encode_continuations(tokenizer, [prompt] * 3, captions, 64, end)
    assert cut == 0
    assert ids.shape[1] == mask.sum(dim=1).max()
    assert torch.equal(mask, mask.cummin(dim=1).values)  # padded on the right
    labeled = labels != IGNORE_INDEX
    assert not (labeled & ~mask).any()
    assert torch.equal(labels[labeled], ids[labeled])
    for row, real, wanted, caption in zip(ids, mask, labeled, captions, strict=True):
        written = row[wanted].tolist()
        assert written[-1] == end
        assert tokenizer.decode(written[:-1]).strip() == caption
        before = row[real & ~wanted].tolist()
        begins = tokenizer("x")["input_ids"][:1] == [end]
        assert before[:1] == [end] if begins else end not in before
        assert tokenizer.decode(before, skip_special_tokens=True) == prompt
        # In one piece, as the LLM reads text; split in two, the space before the caption would be a token of its own.
        text = f"{prompt} {caption}".strip()
        assert row[real].tolist() == [
            *([end] if begins else []),
            *tokenizer.encode(text, add_special_tokens=False),
            end,
        ]


@pytest.mark.parametrize(("caption", "cut"), [("abc", 0), ("abcd", 1), (LONG, 1)])
def test_long_captions_are_cut_and_keep_their_end(parts: Parts, caption: str, cut: int) -> None:
    """The prompt is never cut and does not count; the space behind it is the caption's."""
    tokenizer = AutoTokenizer.from_pretrained(parts.opt)
    ids, mask, labels, found = encode_continuations(tokenizer, ["a photo of"], [caption], 5, END)
    assert found == cut
    assert tokenizer.decode(ids[0]) == f"</s>a photo of {caption[:3]}</s>"
    assert (labels != IGNORE_INDEX).sum() == 5
    assert mask.all()


@pytest.mark.parametrize(
    ("kind", "side", "rows"),
    [
        ("llama", "left", ["<pad>ab", "abc"]),
        ("llama", "right", ["ab<pad>", "abc"]),
        ("opt", "left", ["<pad></s>ab", "</s>abc"]),
        ("t5", "left", ["<pad>ab", "abc"]),
        ("t5", "right", ["ab</s><pad>", "abc</s>"]),
    ],
)
def test_prompts(parts: Parts, kind: str, side: str, rows: list[str]) -> None:
    """What an LLM goes on writing must not end with an end token, and what an encoder reads must."""
    tokenizer = AutoTokenizer.from_pretrained(getattr(parts, kind))
    ids, mask = encode_prompts(tokenizer, ["ab", "abc"], side)
    assert tokenizer.batch_decode(ids.masked_fill(~mask, 257)) == rows


def test_empty_prompts(parts: Parts) -> None:
    ids, mask = encode_prompts(AutoTokenizer.from_pretrained(parts.llama), ["", ""], "left")
    assert ids.shape == mask.shape == (2, 0)


def test_pad() -> None:
    rows = [[1, 2, 3], [], [4]]
    assert pad(rows, -1).tolist() == [[1, 2, 3], [-1, -1, -1], [4, -1, -1]]
    assert pad(rows, -1, "left").tolist() == [[1, 2, 3], [-1, -1, -1], [-1, -1, 4]]
    assert pad([], 0).shape == (0, 0)


@pytest.mark.parametrize("count", range(9))
def test_captions_are_split_anywhere_in_their_first_half(count: int) -> None:
    words = [f"word{i}" for i in range(count)]
    random = np.random.default_rng(0)
    found: Counter[int] = Counter()
    for _ in range(2000):
        prefix, suffix = split_caption(" ".join(words), random)
        assert prefix.split() + suffix.split() == words
        found[len(prefix.split())] += 1
    expected = range(1, count // 2 + 1) if count > 1 else [0]
    assert sorted(found) == list(expected)
    assert min(found.values()) > 0.8 * 2000 / len(expected)


def prepare(
    texts: Collator, captions: list[str], seed: int = 0, questions: list[str] | None = None
) -> tuple[StageBatch, int]:
    count = len(captions)
    images, image_ids = torch.rand(count, 3, 8, 8), torch.arange(count)
    batch, cut = texts(images, captions, questions or [""] * count, image_ids, np.random.default_rng(seed))
    assert batch.images is images
    return batch, cut


def test_representation_texts(bert: PreTrainedTokenizerBase) -> None:
    batch, cut = prepare(Stage1Collator(bert, 6), ["abcdef", "ab"])
    assert isinstance(batch, RepresentationBatch)
    ids, mask, _ = encode_texts(bert, ["abcdef", "ab"], 6)
    assert torch.equal(batch.ids, ids)
    assert torch.equal(batch.mask, mask)
    assert (batch.image_ids.tolist(), cut) == ([0, 1], 1)


def test_generation_texts(parts: Parts) -> None:
    tokenizer = AutoTokenizer.from_pretrained(parts.llama)
    batch, cut = prepare(CausalLMCollator(tokenizer, 6, "is", END), ["abcdef", "ab"])
    assert tokenizer.batch_decode(batch.ids) == ["is abcd</s>", "is ab</s></s></s>"]
    assert tokenizer.batch_decode(batch.labels.masked_fill(batch.labels == IGNORE_INDEX, 257)) == [
        "<pad><pad> abcd</s>",
        "<pad><pad> ab</s><pad><pad>",
    ]
    assert (batch.mask.sum(dim=1).tolist(), cut) == ([8, 6], 1)


@pytest.mark.parametrize("kind", [CausalLMCollator, PrefixLMCollator])
def test_a_prompt_takes_the_question_of_each_answer(parts: Parts, bert: PreTrainedTokenizerBase, kind: type) -> None:
    is_prefix = kind is PrefixLMCollator
    tokenizer = AutoTokenizer.from_pretrained(parts.t5 if is_prefix else parts.llama)
    texts = kind(tokenizer, 6, "Q: {} A:", END, bert)
    assert texts.requires_question and not kind(tokenizer, 6, "a photo of", END).requires_question
    batch, _ = prepare(texts, ["no", "two"], questions=["is it?", "how many {}?"])
    assert isinstance(batch, GenerationBatch)
    answers = ["</s>", "</s>"] if is_prefix else [" no</s>", " two</s>"]
    asked = [f"Q: {question} A:{end}" for question, end in zip(["is it?", "how many {}?"], answers, strict=True)]
    assert [tokenizer.decode(row[real]) for row, real in zip(batch.ids, batch.mask, strict=True)] == asked
    assert tokenizer.decode(batch.labels[0][batch.labels[0] != IGNORE_INDEX]).strip() == "no</s>"
    assert batch.questions is not None
    ids, mask, _ = encode_texts(bert, ["is it?", "how many {}?"], 64)
    assert torch.equal(batch.questions.ids, ids) and torch.equal(batch.questions.mask, mask)
    plain, _ = prepare(replace(texts, qformer_tokenizer=None), ["no", "two"], questions=["is it?", "how many {}?"])
    assert plain.questions is None and torch.equal(plain.ids, batch.ids)


def test_prefix_texts_with_a_prompt(parts: Parts) -> None:
    tokenizer = AutoTokenizer.from_pretrained(parts.t5)
    batch, cut = prepare(PrefixLMCollator(tokenizer, 6, "write", END), ["abcde", "ab", "abcdef"])
    assert tokenizer.batch_decode(batch.ids) == ["write</s>"] * 3
    assert batch.mask.all()
    labels = tokenizer.batch_decode(batch.labels.masked_fill(batch.labels == IGNORE_INDEX, 257))
    assert (labels, cut) == (["abcde</s>", "ab</s><pad><pad><pad>", "abcde</s>"], 1)


def test_prefix_texts_without_a_prompt(parts: Parts) -> None:
    tokenizer = AutoTokenizer.from_pretrained(parts.t5)
    captions = ["two dogs and a cat", "cats"]
    splits = set()
    for seed in range(20):
        batch, cut = prepare(PrefixLMCollator(tokenizer, 32, "", END), captions, seed)
        assert cut == 0
        assert batch.ids[batch.mask].tolist().count(END) == 2
        prefixes = tokenizer.batch_decode(batch.ids.masked_fill(~batch.mask, 257), skip_special_tokens=True)
        suffixes = tokenizer.batch_decode(batch.labels.masked_fill(batch.labels == IGNORE_INDEX, 257))
        assert all(suffix.replace("<pad>", "").endswith("</s>") for suffix in suffixes)
        written = [suffix.split("</s>")[0] for suffix in suffixes]
        assert [f"{a} {b}".strip() for a, b in zip(prefixes, written, strict=True)] == captions
        splits.add(prefixes[0])
    assert splits == {"two", "two dogs"}


@pytest.mark.parametrize("prompt", ["", "write"])
def test_long_captions_are_cut_on_both_sides(parts: Parts, prompt: str) -> None:
    """Encoder and decoder both see no more than the limit, of the beginning of the caption."""
    tokenizer = AutoTokenizer.from_pretrained(parts.t5)
    batch, cut = prepare(PrefixLMCollator(tokenizer, 24, prompt, END), [LONG, "ab cd"])
    assert cut == 1
    assert max(batch.ids.shape[1], batch.labels.shape[1]) <= 24
    prefix = tokenizer.decode(batch.ids[0], skip_special_tokens=True)
    suffix = tokenizer.decode(batch.labels[0], skip_special_tokens=True)
    assert (suffix if prompt else f"{prefix} {suffix}") == LONG[:23]


# -- prompts that end within a token ----------------------------------------------------------------------------------


def sentencepiece(*merged: str) -> PreTrainedTokenizerFast:
    """As Llama 2, Mistral and Gemma have it: the space before a word is a part of its first token."""
    pairs = [("\u2581", "\u2581"), ("C", "a"), ("Ca", "p"), ("\u2581", "Cap"), ("\u2581", "a")]
    pairs += [tuple(pair.split()) for pair in merged]
    words = ["<unk>", "</s>", *"\u2581:Captc7Thehsiw?", *("".join(pair) for pair in pairs)]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(dict.fromkeys(words))}, pairs, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("prompt", ["Cap:", "Cap: ", "Cap:  ", "Cap:\n"])
def test_what_is_trained_is_what_is_used(prompt: str) -> None:
    tokenizer = sentencepiece()
    ids, _, labels, _ = encode_continuations(tokenizer, [prompt], ["a cat"], 32, 1)
    trained = ids[0][labels[0] == IGNORE_INDEX].tolist()
    used = encode_prompts(tokenizer, [prompt], "left")[0][0].tolist()
    assert trained == used
    assert tokenizer.convert_ids_to_tokens(used) == ["\u2581Cap", ":"]
    check_prompt(tokenizer, prompt)


def test_a_prompt_that_ends_within_a_token_is_refused() -> None:
    """Its tokenizer joins a colon with what follows."""
    with pytest.raises(
        InputError, match=r"ends within a token: .* alone are \['.Cap', ':'\], but followed by the text 'a'"
    ):
        check_prompt(sentencepiece(": \u2581a"), "Cap:")


@pytest.mark.parametrize(("begins", "ends"), [(True, False), (False, True), (True, True)])
def test_an_empty_prompt_is_what_comes_before_a_caption(begins: bool, ends: bool) -> None:
    """OPT's tokenizer puts </s> first, that of some Japanese GPT-2s puts it last."""
    tokenizer = byte_tokenizer(begins, ends)
    for prompt in ("", "a b"):
        ids, _, labels, _ = encode_continuations(tokenizer, [prompt], ["cd"], 9, END)
        alone, _ = encode_prompts(tokenizer, [prompt], "left")
        assert alone[0].tolist() == ids[0][labels[0] == IGNORE_INDEX].tolist()
