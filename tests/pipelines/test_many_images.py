"""Any iterable of images, in bounded memory, with images among them that cannot be decoded."""

import logging
import weakref

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from blip2.data.images import ImageError, preprocess
from blip2.decoding.options import Decoding
from blip2.errors import InputError
from blip2.pipelines import images as reading
from blip2.pipelines import load, representation
from blip2.pipelines.images import BATCHES_AHEAD
from conftest import COLORS, SHAPES, draw
from fixtures.tiny import randomize

IMAGES = [draw(shape, color, 0) for shape in SHAPES for color in COLORS]
TEXTS = ["a red disc", "the square is blue here and there"]
QUESTIONS = ["what is it?", "is it red or blue?"]
GREEDY = Decoding(num_beams=1, max_new_tokens=3)


@pytest.fixture(scope="module")
def compare(runs):
    pipeline = load(runs["stage1"], device="cpu")
    randomize(pipeline.model.qformer)
    pipeline.batch_size = 4
    return pipeline


@pytest.fixture(scope="module")
def writer(runs):
    pipeline = load(runs["llama"], device="cpu")
    randomize(pipeline.model.qformer)
    for parameter in pipeline.model.language.parameters():
        if parameter.ndim > 1:
            parameter.data *= 2
    pipeline.batch_size = 4
    return pipeline


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number, image in enumerate(IMAGES):
        image.save(folder / f"{number:02}.png")
    return sorted(folder.iterdir())


@pytest.fixture
def broken(paths, tmp_path):
    """The paths of four images and, in the middle, of a file that is not an image."""
    (tmp_path / "broken.png").write_bytes(b"no image")
    return [*paths[:2], tmp_path / "broken.png", *paths[2:4]]


def message(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# -- iterables -----------------------------------------------------------------------------------------------------


class MapStyle(Dataset):
    """A data set of PyTorch without __iter__."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def test_iterables_of_every_kind(compare, paths):
    expected = compare.embed_images(IMAGES)
    names = list(map(str, paths))
    rows = datasets.Dataset.from_dict({"image": names})
    decoded = rows.cast_column("image", datasets.Image())
    kinds = {
        "a generator": (path for path in paths),
        "a column of paths": rows["image"],
        "a column of images": decoded["image"],
        "rows": decoded,
        "rows that are not decoded": decoded.cast_column("image", datasets.Image(decode=False)),
        "streamed rows": decoded.to_iterable_dataset(),
        "PyTorch's": MapStyle(IMAGES),
        "an array of paths": np.array(names),
        "an array of objects": np.array(paths, dtype=object),
        "an iterator of bytes": iter([path.read_bytes() for path in paths]),
    }
    for kind, images in kinds.items():
        assert torch.equal(compare.embed_images(images), expected), kind


def test_batches_are_those_of_one_array(compare, writer):
    """The images of a call are encoded in the same batches as before images were streamed."""
    pixels = torch.stack([preprocess(image, compare.model.vision.preprocessing) for image in IMAGES])
    features = compare.encode_pixels(pixels)
    assert torch.equal(compare.encode_images(iter(IMAGES)), features)
    with torch.no_grad():
        memories = [compare.model.build_image_memory(part) for part in features.split(4)]
        assert torch.equal(compare.embed_images(IMAGES), torch.cat(list(map(compare.model.embed_images, memories))))
    assert torch.equal(compare.match(iter(IMAGES), TEXTS), compare.match(features, TEXTS))
    captions = writer.caption(IMAGES, decoding=GREEDY)
    assert writer.caption(iter(IMAGES), decoding=GREEDY) == captions and len(set(captions)) > 3


def test_windows_of_visual_prompts(writer, monkeypatch):
    """Texts do not depend on how many visual prompts are collected."""
    images, prompts = IMAGES[:6], [f"image {'z' * (number % 3)}" for number in range(6)]
    monkeypatch.setattr(writer, "batch_size", 2)
    captions = writer.caption(images, prompts, GREEDY)
    answers = writer.answer(iter(images), [QUESTIONS], GREEDY)
    monkeypatch.setattr("blip2.pipelines.generation.WINDOW", 3)
    assert writer.caption(images, prompts, GREEDY) == captions
    assert writer.answer(iter(images), [QUESTIONS], GREEDY) == answers
    assert captions == [writer.caption(*pair, GREEDY)[0] for pair in zip(images, prompts, strict=True)]


@pytest.mark.parametrize("method", ["caption", "embed_images"])
def test_little_is_in_memory(compare, writer, monkeypatch, method):
    """Images are read two batches ahead, and the features of one batch are kept."""
    pipeline = writer if method == "caption" else compare
    vision, alive, ahead = pipeline.model.vision, [], []
    read = encoded = 0
    encode = type(vision).encode

    def watch(self, given):
        nonlocal encoded
        if given.ndim == 3:
            return encode(self, given)
        alive[:] = [reference for reference in alive if reference() is not None]
        features = encode(self, given)
        ahead.append((read - encoded, len(alive)))
        alive.append(weakref.ref(features))
        encoded += len(given)
        return features

    def images():
        nonlocal read
        for number in range(24):
            read += 1
            yield draw("disc", "red", number)

    monkeypatch.setattr(type(vision), "encode", watch)
    options = {"decoding": GREEDY} if method == "caption" else {}
    assert len(getattr(pipeline, method)(images(), **options)) == 24
    assert len(ahead) == 6
    assert max(number for number, _ in ahead) <= (BATCHES_AHEAD + 1) * pipeline.batch_size
    assert max(batches for _, batches in ahead) <= 1


def test_an_image_that_is_given_several_times_is_decoded_by_one_thread_at_a_time(compare, paths):
    opened = Image.open(paths[0])  # Pillow decodes it when it is needed
    expected = compare.embed_images(IMAGES[0])
    torch.testing.assert_close(compare.embed_images([opened] * 20), expected.expand(20, -1, -1))
    with paths[0].open("rb") as file:
        torch.testing.assert_close(compare.embed_images([file] * 20), expected.expand(20, -1, -1))


def test_an_iterator_that_fails(compare):
    def images():
        yield IMAGES[0]
        raise KeyError("a row")

    with pytest.raises(KeyError, match="a row"):
        compare.embed_images(images())


def test_a_progress_bar_on_a_terminal_only(compare, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(reading, "SECONDS_BEFORE_PROGRESS", -1.0)
    monkeypatch.setattr(reading.Display, "start", lambda self, total, done: shown.append((total, done)))
    compare.embed_images(IMAGES)
    assert capsys.readouterr() == ("", "") and not shown
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    compare.embed_images(IMAGES)
    compare.embed_images(iter(IMAGES))  # their number is not known
    assert shown == [(12, 0)]


# -- images that cannot be decoded -----------------------------------------------------------------------------------


def calls(compare, writer):
    """Each method with its options: as functions of images and on_error."""
    return {
        "caption": lambda images, **options: writer.caption(images, decoding=GREEDY, **options),
        "answer": lambda images, **options: writer.answer(images, QUESTIONS[0], GREEDY, **options),
        "answers": lambda images, **options: writer.answer(images, [QUESTIONS], GREEDY, **options),
        "Z of stage 2": writer.query_outputs,
        "embed_images": compare.embed_images,
        "similarity": lambda images, **options: compare.similarity(images, TEXTS, **options),
        "match": lambda images, **options: compare.match(images, TEXTS, **options),
        "embed": lambda images, **options: compare.embed(images, TEXTS[0], **options),
        "Z": compare.query_outputs,
        "attention_maps": compare.attention_maps,
        "caption of stage 1": lambda images, **options: compare.caption(images, decoding=GREEDY, **options),
    }


def test_a_broken_image_loses_nothing_else(compare, writer, paths, broken, caplog, monkeypatch):
    for pipeline in (compare, writer):
        monkeypatch.setattr(pipeline, "batch_size", 2)
    for name, call in calls(compare, writer).items():
        expected = list(call(paths[:4]))
        caplog.clear()
        with caplog.at_level(logging.WARNING, "blip2"):
            skipped = list(call(iter(broken), on_error="skip"))
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == 2 and "broken.png is not an image" in lines[0], name
        assert lines[0].startswith("image 3 is left out: ")
        assert lines[1] == "1 of 5 images were left out because they cannot be decoded"
        returned = call(broken, on_error="return")
        assert isinstance(returned, list) and isinstance(returned[2], ImageError), name
        assert "broken.png" in str(returned.pop(2))
        for found in (skipped, returned):
            if isinstance(expected[0], torch.Tensor):
                torch.testing.assert_close(list(found), expected, atol=1e-5, rtol=1e-5)
            else:
                assert found == expected, name
        with pytest.raises(ImageError, match=r"broken\.png is not an image"):
            call(broken)


def test_errors_of_several_questions(writer, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    first, second = writer.answer(tmp_path / "broken.png", QUESTIONS, GREEDY, on_error="return")
    assert first is second and isinstance(first, ImageError)


def test_no_image_can_be_decoded(compare, tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(InputError) as raised:
        compare.embed_images([tmp_path / "empty.png"] * 2, on_error="skip")
    assert message(raised).startswith("none of the 2 images can be decoded: image ")
    (error,) = compare.match(tmp_path / "empty.png", TEXTS, on_error="return")
    assert isinstance(error, ImageError)


def test_other_values_of_on_error():
    with pytest.raises(InputError) as raised:
        reading.check_on_error("ignore")
    assert message(raised) == "on_error is 'ignore', expected one of raise, skip, return: use one of them"


# -- questions -----------------------------------------------------------------------------------------------------


def test_questions_of_each_image(writer):
    images = IMAGES[:3]
    every = writer.answer(images, [QUESTIONS], GREEDY)
    assert every == [writer.answer(image, QUESTIONS, GREEDY) for image in images]
    own = writer.answer(iter(images), [QUESTIONS, QUESTIONS[:1], ["how many?"]], GREEDY)
    assert list(map(len, own)) == [2, 1, 1]
    assert own[0] == every[0] and own[1] == every[1][:1]
    assert own[2] == writer.answer(images[2], "how many?", GREEDY)
    assert writer.answer(iter(images), [*QUESTIONS, "how many?"], GREEDY) == [
        answer
        for pair in zip(images, [*QUESTIONS, "how many?"], strict=True)
        for answer in writer.answer(*pair, GREEDY)
    ]


def test_numbers_that_do_not_fit(compare, writer):
    for call, found in (
        (lambda: writer.answer(IMAGES[:3], [QUESTIONS, QUESTIONS]), "there are 3 images and 2 lists: give one list"),
        (lambda: writer.answer(iter(IMAGES[:3]), QUESTIONS), "there are more than 2 images and 2 questions: give one"),
        (lambda: writer.answer(iter(IMAGES[:2]), [*QUESTIONS, "?"]), "there are 2 images and 3 questions: give one"),
        (lambda: writer.answer(IMAGES[:2], [QUESTIONS, []]), "no question was given: give at least one"),
        (lambda: writer.answer(IMAGES[:2], [QUESTIONS, [" "]]), "question 1 of 1 is ' ', expected words"),
        (lambda: writer.caption(iter(IMAGES[:3]), ["", ""]), "there are more than 2 images and 2 prompts: give one"),
        (lambda: compare.embed(IMAGES[:3], TEXTS), "there are 3 images and 2 texts: give one text per image"),
        (lambda: compare.match_candidates(IMAGES[:3], TEXTS, torch.zeros(2, 1).long()), "give a row of candidates"),
        (lambda: compare.match_candidates(IMAGES[:1], TEXTS, torch.zeros(2, 1).long()), "give a row of candidates"),
    ):
        with pytest.raises(InputError) as raised:
            call()
        assert found in message(raised)


# -- similarity ----------------------------------------------------------------------------------------------------


def test_similarity_of_embeddings(compare, monkeypatch):
    images, texts = compare.embed_images(IMAGES), compare.embed_texts(TEXTS)
    expected = compare.similarity(IMAGES, TEXTS)
    assert torch.equal(compare.similarity(images, TEXTS), expected)
    assert torch.equal(compare.similarity(images, texts), expected)
    assert torch.equal(compare.similarity(IMAGES, texts), expected)
    torch.testing.assert_close(compare.similarity(images.half(), TEXTS), expected, atol=1e-3, rtol=0)
    sizes = []
    original = representation.image_text_similarity
    monkeypatch.setattr(
        representation, "image_text_similarity", lambda *given: sizes.append(len(given[0])) or original(*given)
    )
    monkeypatch.setattr(representation, "MAX_LOGITS_PER_CHUNK", 5 * images.shape[1] * len(TEXTS))
    torch.testing.assert_close(compare.similarity(images, TEXTS), expected)
    assert sizes == [5, 5, 2]
