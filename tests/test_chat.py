"""Conversations, streamed text, and the terminal: the same words as without a cache, each token computed once."""

import io
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from blip2.backbones.language import LanguageModel, load_language_model
from blip2.backbones.vision_loaders import load_image_encoder
from blip2.config import LanguageConfig, ModelConfig, QFormerConfig, VisionConfig
from blip2.data.arrays import blank_input
from blip2.decoding.options import Decoding
from blip2.decoding.search import generate, generate_without_cache
from blip2.decoding.text import TextStreamer, final_text
from blip2.errors import InputError
from blip2.model.generation import GenerationModel
from blip2.pipelines import Chat, GenerationPipeline
from blip2.pipelines.terminal import talk
from conftest import byte_tokenizer, draw
from fixtures.tiny import QFORMER, randomize

QUERIES = QFORMER.num_query_tokens
GREEDY = Decoding(num_beams=1, max_new_tokens=3)
SAMPLED = Decoding(top_p=0.9, temperature=1.3, max_new_tokens=3)
IMAGES = [draw("disc", "red", 0), draw("square", "blue", 10), draw("stripe", "green", 20)]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@cache
def shared(parts: Any, name: str, is_cached: bool = True, reads_questions: bool = False) -> GenerationPipeline:
    """For tests that do not change it."""
    changes = {"use_qformer_text_input": True} if reads_questions else {}
    pipeline = make(parts, name, None if is_cached else generate_without_cache, **changes)
    pipeline.tokenizer.chat_template = TEMPLATE
    return pipeline


def make(parts: Any, name: str, generate_fn: Any = generate, **changes: Any) -> GenerationPipeline:
    language = load_language_model(getattr(parts, name))
    language._generate_fn = generate_fn  # None: the fastest that works
    qformer: QFormerConfig = replace(QFORMER, vocab_size=58, max_position_embeddings=40, **changes)
    model = GenerationModel(load_image_encoder(parts.vision), qformer, language).eval()
    randomize(model.qformer)
    torch.manual_seed(0)
    model.initialize_projection()
    prompt = "Question: {} Answer:" if qformer.use_qformer_text_input else ""
    config = ModelConfig(
        "generation", VisionConfig(parts.vision), qformer, LanguageConfig(getattr(parts, name), prompt=prompt)
    )
    tokenizer = AutoTokenizer.from_pretrained(getattr(parts, name))
    reader = AutoTokenizer.from_pretrained(parts.bert, model_max_length=40) if qformer.use_qformer_text_input else None
    return GenerationPipeline(model, tokenizer, config, Path("x"), 256, reader)


@pytest.fixture(scope="module")
def pipeline(parts):
    return shared(parts, "llama")


class Count:
    """Counts the places that an LLM computes."""

    def __init__(self, language: LanguageModel) -> None:
        self.seen: list[int] = []
        language.network.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _: Any, __: Any, given: dict[str, Any]) -> None:
        self.seen.append(next(given[key].shape[1] for key in ("inputs_embeds", "input_ids") if key in given))


def transcript(pipeline: GenerationPipeline, decoding: Decoding, template: str | None) -> list[Any]:
    """A conversation with every kind of turn."""
    torch.manual_seed(5)
    chat = pipeline.chat(IMAGES[:2], template=template, decoding=decoding)
    said: list[Any] = [chat.ask("what is it?"), chat.ask("and its color?", replace(decoding, max_new_tokens=2))]
    earlier = chat.copy()
    said.append(chat.ask([{"type": "text", "text": "is "}, {"type": "image", "image": IMAGES[2]}, "like it?"]))
    pieces = chat.stream("one more word?", replace(decoding, stop_strings=["e", "a"]))
    said += [next(pieces, None), *pieces]
    said += [earlier.ask("really?"), chat.ask("why?"), earlier.ask("no?")]
    pieces = chat.stream("go on", replace(decoding, max_new_tokens=8))
    said.append(next(pieces))
    pieces.close()
    said += [chat.ask("what was that?"), [each["content"] for each in chat.messages if each["role"] == "assistant"]]
    chat.reset()
    said.append(chat.ask("what is it?"))
    return said


@pytest.mark.parametrize(
    ("name", "template", "decoding"),
    [("llama", None, GREEDY), ("llama", "chat", SAMPLED), ("t5", None, SAMPLED)],
)
def test_answers_are_those_without_a_cache(parts, name, template, decoding):
    said = []
    for is_cached in (True, False):
        pipeline = shared(parts, name, is_cached)
        said.append(transcript(pipeline, decoding, template))
        assert pipeline.model.language.generate_fn is (generate if is_cached else generate_without_cache)
    assert said[0] == said[1]
    assert len({str(each) for each in said[0]}) > 5


def test_answers_of_a_qformer_that_reads_questions_are_those_without_a_cache(parts):
    made = [shared(parts, "llama", is_cached, reads_questions=True) for is_cached in (True, False)]
    said = []
    for pipeline in made:
        chat = pipeline.chat(IMAGES[:2], decoding=GREEDY)
        answers = [chat.ask("what?"), chat.ask(["and ", {"type": "image", "image": IMAGES[2]}])]
        earlier = chat.copy()
        said.append([*answers, chat.ask("why?"), earlier.ask("what?")])
    assert said[0] == said[1]


@pytest.mark.parametrize("name", ["llama", "opt", "t5"])
def test_the_first_answer_is_that_of_answer(parts, name):
    pipeline, decoding = shared(parts, name), replace(GREEDY, max_new_tokens=6)
    assert pipeline.chat(IMAGES[0], decoding=decoding).ask("what is it?") == pipeline.answer(
        IMAGES[0], "what is it?", decoding
    )[0]  # fmt: skip


@pytest.mark.parametrize("template", [None, "chat"])
def test_each_turn_costs_its_new_tokens_only(parts, template):
    pipeline = make(parts, "llama")
    pipeline.tokenizer.chat_template = TEMPLATE
    count = Count(pipeline.model.language)
    encoded: list[int] = []
    pipeline.model.vision.network.register_forward_pre_hook(lambda *_: encoded.append(1))
    chat = pipeline.chat(IMAGES[0], template=template, decoding=GREEDY)
    before, per_turn = 0, []
    for _ in range(4):
        chat.ask("what is it?")
        assert chat._decoder is not None
        places = len(chat._decoder._keys)
        assert sum(count.seen) == places  # nothing is computed twice
        per_turn.append(places - before)
        before = places
    assert len(encoded) == 1
    assert max(per_turn[1:]) < per_turn[0] + GREEDY.max_new_tokens + 4
    # An image in the middle costs its queries, and an answer that is asked for again the last place of its prompt.
    chat.ask(["and ", {"type": "image", "image": IMAGES[1]}, "?"])
    assert sum(count.seen) == len(chat._decoder._keys) and encoded == [1, 1]
    again, steps = chat.copy(), len(count.seen)
    again._messages, again._written = again._messages[:-2], again._written[:-1]
    again.ask(["and ", {"type": "image", "image": IMAGES[1]}, "?"])
    assert count.seen[steps] < QUERIES + len("Question: and ? Answer:") + 2


def test_a_qformer_that_reads_questions_reads_the_images_again(parts):
    pipeline = make(parts, "llama", use_qformer_text_input=True)
    count = Count(pipeline.model.language)
    asked: list[int] = []
    pipeline.model.qformer.register_forward_pre_hook(lambda *_: asked.append(1))
    chat = pipeline.chat(IMAGES[:2], decoding=GREEDY)
    for question in ("what is it?", "which color?", "what is it?"):
        chat.ask(question)
    assert len(asked) == 4  # two images, two different questions
    assert chat._decoder is not None
    keys = [key for key in chat._decoder._keys if isinstance(key, tuple)]
    assert len(keys) == 3 * 2 * QUERIES and sum(count.seen) == len(chat._decoder._keys)
    # The visual prompts of a question are those with which answer() reads it.
    visual = chat._visual_prompts[0, "which color?"]
    expected = pipeline._visual_prompts(
        pipeline.encode_images(IMAGES[0]), pipeline._encode_questions(["which color?"], [""]), torch.tensor([0])
    )
    torch.testing.assert_close(visual, expected[0])


def test_images_stand_where_the_messages_put_them(pipeline):
    parts = [{"type": "text", "text": "is "}, {"type": "image"}, {"type": "text", "text": " like "}, {"type": "image"}]
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [*parts, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": [{"type": "image", "path": IMAGES[2]}, {"type": "text", "text": "and this?"}]},
    ]
    chat = pipeline.chat(IMAGES[:2], history, decoding=GREEDY)
    prompt = chat._render(chat._messages)
    assert prompt.text == ("Be brief. Question: is <image> like <image>? Answer: no.<image>Question: and this? Answer:")
    assert [image for image, _ in prompt.images] == [0, 1, 2]
    answer = chat.ask()
    messages = chat.messages
    assert messages[-1] == {"role": "assistant", "content": answer}
    assert [part["type"] for part in messages[1]["content"]] == ["text", "image", "text", "image", "text"]
    assert pipeline.chat(messages=messages[:-1], decoding=GREEDY).ask() == answer
    messages.clear()
    assert len(chat.messages) == 5  # what is returned is a copy
    first = pipeline.chat(IMAGES[:2], [{"role": "user", "content": "which is red?"}], decoding=GREEDY)
    assert first._render(first._messages).text == "<image><image>Question: which is red? Answer:"
    without = pipeline.chat(messages=[{"role": "user", "content": "hello?"}], decoding=GREEDY)
    assert isinstance(without.ask(), str)
    features = pipeline.encode_images(IMAGES[:2])
    assert pipeline.chat(features, decoding=GREEDY).ask("what?") == pipeline.chat(IMAGES[:2], decoding=GREEDY).ask(
        "what?"
    )


def test_the_chat_template_of_the_llm(parts):
    pipeline = make(parts, "llama")
    pipeline.tokenizer.chat_template = TEMPLATE
    chat = pipeline.chat(IMAGES[0], template="chat", decoding=GREEDY)
    answer = chat.ask("what is it?")
    messages = [*chat._messages, chat._make_message("user", ["why?"], True)]
    assert chat._render(messages).text == (
        f"<user><image>what is it?\n<assistant>{answer.strip()}\n<user>why?\n<assistant>"
    )
    for template, expected in (
        ("{{ raise_exception('no roles') }}", "chat template refuses the messages (TemplateError: no roles)"),
        ("{{ messages[0]['content'][:1] }}", "does not repeat the messages as they are"),
    ):
        pipeline.tokenizer.chat_template = template
        with pytest.raises(InputError) as raised:
            pipeline.chat(IMAGES[0], template="chat").ask("what?")
        assert expected in str(raised.value)
    pipeline.tokenizer.chat_template = None
    with pytest.raises(InputError, match="has no chat template: leave out template"):
        pipeline.chat(IMAGES[0], template="chat")


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("reads_questions", [False, True])
def test_the_explanation_of_an_answer(parts, name, reads_questions):
    pipeline = shared(parts, name, reads_questions=reads_questions)
    before = pipeline.chat(IMAGES[0], template="chat", decoding=GREEDY)
    before.ask("what is it?")
    chat = before.copy()
    chat.ask("and its color?")
    found = chat.explain()
    tokens = list(chat._written[-1].tokens)
    assert found.tokens == tuple(pipeline.tokenizer.decode([token]) for token in tokens)
    blank = pipeline.encode_pixels(blank_input(pipeline.model.vision.input_format))
    other = pipeline.chat(blank)

    def log_probs(change):
        """Ask the network itself, with other visual prompts."""
        asked = before.copy()
        asked.encode_prompt("and its color?")
        for key in asked._visual_prompts:
            asked._visual_prompts[key] = change(asked._visual_prompts[key], other._visual_prompt(0, key[1]))
        prompt = asked.encode_prompt("and its color?").inputs_embeds()[0]
        network, ids = pipeline.model.language.network, torch.tensor([tokens])
        with torch.no_grad():
            if name == "t5":
                logits = network(inputs_embeds=prompt, labels=ids).logits
            else:
                embeds = torch.cat([prompt, network.get_input_embeddings()(ids)], dim=1)
                logits = network(inputs_embeds=embeds).logits[:, prompt.shape[1] - 1 : -1]
        return logits.log_softmax(dim=-1)[0]

    def without(query):
        return lambda seen, unseen: torch.where((torch.arange(QUERIES) == query)[:, None], unseen, seen)

    own = log_probs(lambda seen, unseen: seen)
    places = torch.arange(len(tokens)), torch.tensor(tokens)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(torch.tensor(found.token_log_probs), own[places], **close)
    unseen = log_probs(lambda seen, unseen: unseen)[places]
    torch.testing.assert_close(torch.tensor(found.blank_log_probs), unseen, **close)
    effects = torch.stack([own[places] - log_probs(without(query))[places] for query in range(QUERIES)], dim=1)
    torch.testing.assert_close(found.effects, effects, **close)
    assert effects.abs().max() > 1e-3
    question = "and its color?" if reads_questions else None
    torch.testing.assert_close(found.attention_map, pipeline.attention_maps(IMAGES[0], question)[0, -1])
    others = own.clone()
    others[places] = -torch.inf
    values = torch.tensor([[other.log_prob for other in each] for each in found.alternatives])
    torch.testing.assert_close(values, others.topk(4).values, **close)
    assert chat.ask("why?") == chat.messages[-1]["content"]  # the chat goes on


def test_an_answer_that_cannot_be_explained(pipeline):
    chat = pipeline.chat(IMAGES[0], decoding=GREEDY)
    with pytest.raises(InputError, match="is not an answer of this chat"):
        chat.explain()
    told = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    with pytest.raises(InputError, match="is not an answer of this chat"):
        pipeline.chat(IMAGES[0], told).explain()
    for images, count in ((None, 0), (IMAGES[:2], 2)):
        chat = pipeline.chat(images, decoding=GREEDY)
        chat.ask("what is it?")
        with pytest.raises(InputError, match=f"has {count} images, expected one"):
            chat.explain()


def test_a_conversation_that_no_longer_fits(parts):
    pipeline = shared(parts, "opt")  # 96 positions
    chat = pipeline.chat(IMAGES[0], decoding=GREEDY)
    answers = [chat.ask("what is it?")]
    with pytest.raises(
        InputError, match=r"has \d+ tokens and its next answer up to 3, but the LLM has only 96"
    ) as said:
        for _ in range(9):
            answers.append(chat.ask("what is it?"))
    assert "reset()" in str(said.value) and len(chat.messages) == 2 * len(answers)
    chat.reset()
    assert chat.ask("what is it?") == answers[0]


# -- streaming ---------------------------------------------------------------------------------------------------------


STOPPED = replace(GREEDY, stop_strings=("e", "x"), max_new_tokens=6)


@pytest.mark.parametrize(
    ("name", "decoding"), [("llama", GREEDY), ("llama", SAMPLED), ("llama", STOPPED), ("t5", STOPPED)]
)
def test_streamed_text_is_the_text_of_caption_and_answer(parts, name, decoding):
    pipeline = shared(parts, name)
    for given, method in (({"prompt": "a photo of"}, pipeline.caption), ({"question": "what?"}, pipeline.answer)):
        torch.manual_seed(1)
        pieces = list(pipeline.stream(IMAGES[0], decoding=decoding, **given))
        torch.manual_seed(1)
        assert "".join(pieces) == method(IMAGES[0], *given.values(), decoding)[0]
        assert "" not in pieces


@pytest.mark.parametrize("stop_strings", [None, ["stop"], ["wörld 你"], ["👍!"], ["好 s", "好 st"], ["zzz", "here"]])
def test_pieces_hold_back_what_may_change(stop_strings):
    tokenizer, text = byte_tokenizer(), "  héllo  wörld 你好 👍 stop here\n"
    tokens = tokenizer(text)["input_ids"]
    streamer = TextStreamer(tokenizer, stop_strings)
    pieces = [streamer.put(tokens[: n + 1]) for n in range(len(tokens))]
    expected = final_text(text, stop_strings)
    for n, piece in enumerate(pieces):
        assert "\ufffd" not in piece
        assert expected.startswith("".join(pieces[: n + 1]))
    assert "".join([*pieces, streamer.end(tokens)]) == expected
    assert sum(map(bool, pieces)) > len(expected) / 3  # as soon as it is there


def test_an_answer_that_was_left_for_another_question(pipeline):
    chat = pipeline.chat(IMAGES[0], decoding=replace(GREEDY, max_new_tokens=12))
    left = chat.stream("what is it?")
    next(left)
    answer = chat.ask("and what is this?")
    with pytest.raises(InputError, match="the chat went on before this answer was read to its end"):
        next(left)
    assert [each["role"] for each in chat.messages] == ["user", "assistant"]
    assert answer == pipeline.chat(IMAGES[0], decoding=replace(GREEDY, max_new_tokens=12)).ask("and what is this?")


def test_images_after_a_reset_are_not_those_before(pipeline):
    """They get the same indices, and the cache of the chat knows images by their indices."""
    chat = pipeline.chat(iter(IMAGES[:1]), decoding=GREEDY)
    chat.add_images(IMAGES[1])
    chat.ask("what?")
    chat.reset()
    chat.add_images(IMAGES[2])
    assert chat.ask("what?") == pipeline.chat([IMAGES[0], IMAGES[2]], decoding=GREEDY).ask("what?")
    assert len(chat._features) == len(chat._originals) == len(chat._visual_prompts) == 2
    expected = pipeline._visual_prompts(pipeline.encode_images(IMAGES[2]), None, torch.tensor([0]))
    torch.testing.assert_close(chat._visual_prompts[1, None], expected[0])
    # An iterator of images was read; what the messages have can be read again.
    again = pipeline.chat(messages=chat.messages[:-1], decoding=GREEDY)
    assert again.ask() == chat.messages[-1]["content"]


# -- bad input ---------------------------------------------------------------------------------------------------------


REFUSED = [
    ({"num_beams": 2.5}, "num_beams is 2.5, expected a whole number: give a whole number"),
    ({"num_beams": "3"}, "num_beams is '3', expected a whole number"),
    ({"top_k": 2.5}, "top_k is 2.5, expected a whole number"),
    ({"top_k": 0}, "top_k is 0, expected at least 1"),
    ({"top_p": "0.9"}, "top_p is '0.9', expected a number"),
    ({"min_p": 1.5}, "min_p is 1.5, expected 0 to 1"),
    ({"max_new_tokens": None}, "max_new_tokens is None, expected a number"),
    ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1, expected at least 0"),
    ({"no_repeat_ngram_size": True}, "no_repeat_ngram_size is true, expected a number"),
    ({"stop_strings": ["a", ""]}, "stop_strings is ['a', ''], expected a list of non-empty strings"),
    ({"stop_strings": 3}, "stop_strings is 3, expected a list of non-empty strings"),
    ({"num_beams": 3, "top_p": 0.9}, "num_beams is 3 and top_p is 0.9, but sampling has no beams: leave out one"),
    ({"num_beams": 3, "top_k": 9}, "num_beams is 3 and top_k is 9, but sampling has no beams"),
    ({"temperature": 0.7}, "temperature is 0.7, but nothing is sampled: also set top_p, top_k or min_p"),
]


def test_options_that_are_refused():
    """In a process without the type checks of the tests, which refuse some of them earlier."""
    code = """
import ast, sys
from blip2.decoding.options import Decoding, InputError
for given in ast.literal_eval(sys.argv[1]):
    try:
        print(Decoding(**given))
    except InputError as error:
        print(error)
"""
    given = repr([each for each, _ in REFUSED])
    done = subprocess.run([sys.executable, "-c", code, given], capture_output=True, text=True, check=True)
    for line, (_, expected) in zip(done.stdout.splitlines(), REFUSED, strict=True):
        assert expected in line


USER = {"role": "user", "content": "what?"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"messages": [{"text": "hello"}]}, "message 1 of 1 is {'text': 'hello'}, expected {'role'"),
        ({"messages": [USER, USER]}, "message 2 of 2 has the role 'user', expected 'assistant'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "has the role 'tool', expected 'system' or 'user'"),
        ({"messages": [{"role": "user", "content": " "}]}, "message 1 of 1 is ' ', expected words"),
        ({"messages": [{"role": "user", "content": 3}]}, "the content of message 1 of 1 is 3, expected a text"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "has the part {'type': 'audio'}"),
        ({"messages": [{"role": "user", "content": "an <image>"}]}, "contains <image>: remove it, and put a part"),
        ({"messages": [{"role": "user", "content": "a</s>"}]}, "contains </s>, a special token of the LLM: remove it"),
        ({"messages": [{"role": "user", "content": ["x", {"type": "image"}]}]}, "no image is left for it"),
        (
            {"messages": [{"role": "user", "content": ["x", {"type": "image", "url": "http://x"}]}]},
            "has the key 'url', expected 'image' or 'path'",
        ),
        (
            {"messages": [{"role": "system", "content": ["x", {"type": "image"}]}]},
            "is of role 'system' and has an image",
        ),
        (
            {"images": IMAGES, "messages": [{"role": "user", "content": ["x", {"type": "image"}]}]},
            "there are 3 images, but only 1 places for them in the messages",
        ),
        ({"images": "nowhere.png"}, "nowhere.png"),
        ({"decoding": Decoding(num_beams=3)}, "num_beams is 3, but beam search cannot stream tokens"),
        ({"template": "Question:"}, "the template is 'Question:', expected 'chat' or a prompt with {}"),
    ],
)
def test_chats_that_are_refused(pipeline, arguments, expected):
    with pytest.raises(InputError) as raised:
        pipeline.chat(**arguments)
    assert expected in str(raised.value) and "\n" not in str(raised.value)


def test_questions_that_are_refused(pipeline):
    chat: Chat = pipeline.chat(IMAGES[0], decoding=GREEDY)
    for content, options, expected in (
        (None, None, "there is no question to answer: give one"),
        ("", None, "the message is '', expected words"),
        ([{"type": "image", "image": "nowhere.png"}, "x"], None, "nowhere.png"),
        (["x", {"type": "image"}, {"type": "image"}], None, "no image is left for it"),
        ("what?", Decoding(num_beams=3), "num_beams is 3, but beam search cannot stream tokens"),
    ):
        with pytest.raises(InputError) as raised:
            chat.ask(content, options)
        assert expected in str(raised.value)
    assert chat.messages == [] and chat.ask("what?") == pipeline.chat(IMAGES[0], decoding=GREEDY).ask("what?")
    waiting = pipeline.chat(IMAGES[0], [USER], decoding=GREEDY)
    with pytest.raises(InputError, match="the last message of the user has no answer yet"):
        waiting.ask("why?")
    with pytest.raises(InputError, match=r"the last message of the user has no answer yet: .* then add images"):
        waiting.add_images(IMAGES[1])
    assert waiting.ask() == pipeline.chat(IMAGES[0], decoding=GREEDY).ask("what?")
    with pytest.raises(InputError, match="there are 2 images, expected one: use chat"):
        pipeline.stream(IMAGES[:2], "a")
    with pytest.raises(InputError, match="found both prompt and question"):
        pipeline.stream(IMAGES[0], "a", question="b")


def test_a_question_that_is_cut_before_its_image(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline, "config", replace(pipeline.config, text_normalization="lavis"))
    chat = pipeline.chat(IMAGES[0], decoding=GREEDY)
    with pytest.raises(InputError, match="has 1 places for images, expected 2: a normalized question keeps its first"):
        chat.ask([{"type": "image"}, "word " * 60, {"type": "image", "image": IMAGES[1]}])


# -- the terminal ------------------------------------------------------------------------------------------------------


def test_questions_from_a_pipe(pipeline, capsys, tmp_path):
    IMAGES[1].save(tmp_path / "b.png")
    chat = pipeline.chat(IMAGES[0], decoding=GREEDY)
    lines = f"what?\n\n  why?\n/image {tmp_path / 'b.png'}\nand?\n/reset\nwhat?\n/help\n/quit\nnever\n"
    talk(chat, io.StringIO(lines))
    shown = capsys.readouterr()
    other = pipeline.chat(IMAGES[0], decoding=GREEDY)
    answers = [other.ask("what?"), other.ask("why?"), other.ask([{"type": "image", "image": IMAGES[1]}, "and?"])]
    expected = [ascii_line(each) for each in [*answers, answers[0]]]
    assert shown.out.splitlines()[:4] == expected and shown.err == ""
    assert "/image PATH" in shown.out.splitlines()[4] and "never" not in shown.out
    for line, message in (("/imagine x", "/imagine x is not a command, expected"), ("/image nowhere", "nowhere")):
        with pytest.raises(InputError, match=message):
            talk(chat, io.StringIO(line))
    with pytest.raises(InputError, match="the input is not UTF-8"):
        talk(chat, io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))


def ascii_line(text: str) -> str:
    from blip2.errors import escape_control_characters

    return escape_control_characters(text)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_goes_on_after_errors_and_ctrl_c(parts, capsys, monkeypatch):
    pipeline = make(parts, "llama")
    lines = iter(["/nothing", "what?", KeyboardInterrupt, "/image nowhere.png", "why?", EOFError])

    def read(_: str) -> str:
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    passes = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests without it

    def interrupt(*_: object) -> None:
        passes.append(1)
        if len(passes) == 4:
            signal.raise_signal(signal.SIGINT)

    pipeline.model.language.network.register_forward_pre_hook(interrupt)
    chat = pipeline.chat(IMAGES[0], decoding=replace(GREEDY, max_new_tokens=8))
    talk(chat, Terminal())
    shown = capsys.readouterr()
    assert "[interrupted]" in shown.out and "/quit leaves" in shown.out
    assert [line.split()[1] for line in shown.err.splitlines()] == ["/nothing", "nowhere.png"] or (
        "error: /nothing is not a command" in shown.err and "nowhere.png" in shown.err
    )
    # The conversation has the answer as far as it was written, and goes on as if it had ended there.
    messages = chat.messages
    assert [each["role"] for each in messages] == ["user", "assistant", "user", "assistant"]
    assert len(messages[1]["content"]) <= 3
    # Between pipes, Ctrl-C ends the program.
    passes.clear()
    with pytest.raises(KeyboardInterrupt):
        talk(chat, io.StringIO("what?\nwhy?\n"))
    signal.signal(signal.SIGINT, before)
