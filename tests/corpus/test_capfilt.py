import json
import re
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch
import yaml

from blip2.cli import build_parser
from blip2.config import DataConfig
from blip2.corpus import capfilt as module
from blip2.corpus import units as units_module
from blip2.corpus.capfilt import CapFiltConfig, capfilt
from blip2.corpus.options import Engine
from blip2.corpus.selection import SelectionRules
from blip2.corpus.units import Unit, list_units, read_unit
from blip2.data.benchmarks import is_benchmark, read_benchmark
from blip2.data.shards import Sample
from blip2.data.sources import open_records
from blip2.decoding.search import Decoding
from blip2.errors import InputError
from blip2.recipe import load_recipe
from blip2.training.metrics import read_metrics
from blip2.training.trainer import train
from fixtures.corpus import encoded, read_tar, write_tar

CONFIG = CapFiltConfig(num_captions=3, decoding=Decoding(top_p=0.9, max_new_tokens=6), batch_size=4, shard_size=10)
ONE = Engine(num_threads=1)
RECIPES = Path(__file__).parents[2] / "recipes"


def run(runs, source, output, config=CONFIG, ranker=None, **options):
    models = str(runs["llama"]), ranker or str(runs["stage1"])
    return capfilt(*models, str(source), output, config, engine=ONE, device="cpu", **options)


@pytest.fixture(scope="module")
def done(runs, shards, tmp_path_factory):
    output = tmp_path_factory.mktemp("done") / "output"
    return output, run(runs, shards / "*.tar", output)


def tars(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def test_shards_hold_the_images_as_they_were_and_the_best_captions(done, shards):
    output, metrics = done
    assert sorted(tars(output)) == [f"0000{n}.tar" for n in range(4)]
    for path in sorted(output.glob("*.tar")):
        before, after = read_tar(shards / path.name), read_tar(path)
        assert [name for name in after if name.endswith("png")] == [name for name in before if name.endswith("png")]
        assert all(after[name] == before[name] for name in after if name.endswith("png"))
        for name in (name for name in after if name.endswith("json")):
            about = json.loads(after[name])
            assert 1 <= len(about["captions"]) <= 2
            assert about["scores"] == sorted(about["scores"], reverse=True)
            assert len(about["captions"]) == len(about["scores"]) == len(about["original"])
    counts = metrics["counts"]
    assert (counts["images"], counts["written"], counts["with an original"]) == (24, 24, 24)
    generated = counts["captions, generated, kept"] + counts["captions, generated, dropped"]
    assert 60 < generated <= 72  # three each, but for those that were written twice
    kept = [is_original for about in metadata_of(*output.glob("*.tar")) for is_original in about["original"]]
    assert sum(kept) == counts["captions, original, kept"]
    assert "ranked lower" in metrics["dropped"] and metrics["skipped"] == {}


def metadata_of(*paths):
    """Metadata of the samples of shards."""
    return [json.loads(data) for path in paths for name, data in read_tar(path).items() if name.endswith("json")]


def test_training_reads_what_was_written(done):
    output, _ = done
    source, config = str(output / "*.tar"), DataConfig(train="")
    streamed = list(open_records(source, config).read())
    assert len(streamed) == 24
    wanted = [tuple(about["captions"]) for about in metadata_of(*sorted(output.glob("*.tar")))]
    assert [record.captions for record in streamed] == wanted
    benchmark = list(read_benchmark(f"cc3m:train:{output}"))
    assert [(row["image"], tuple(row["captions"])) for row in benchmark] == [(r.image, r.captions) for r in streamed]
    table = open_records(source, replace(config, streaming=False))
    assert [(r.image, r.captions) for r in table] == [(r.image, r.captions) for r in streamed]


PRETRAINING = sorted(path.stem for path in RECIPES.glob("pretrain-*.yaml"))


@pytest.mark.parametrize("name", PRETRAINING)
def test_recipes_say_how_the_captions_of_web_images_are_made(name):
    """By the command in the recipe, or in the one that it is based on, with the paper's numbers as defaults (§3.4)."""
    texts, path = [], RECIPES / f"{name}.yaml"
    while path is not None:
        texts.append(path.read_text())
        base = yaml.safe_load(texts[-1]).get("base")
        path = base and path.with_name(base)
    (command,) = re.findall(r"^ *# blip2 (capfilt .*)$", "\n".join(texts), re.MULTILINE)
    options = build_parser().parse_args(command.split())
    made = {
        options.data.replace("cc3m", web): options.output.replace("cc3m", web)
        for web in ("cc3m", "cc12m", "sbu", "laion")
    }
    assert (options.captions, options.keep, options.top_p) == (10, 2, 0.9)
    assert options.captioner == "Salesforce/blip-image-captioning-large"
    assert options.ranker == "openai/clip-vit-large-patch14"
    assert [is_benchmark(source) for source in made] == [True] * 4
    sources = set(load_recipe(RECIPES / f"{name}.yaml").data.sources)
    assert {f"{output}/*.tar" for output in made.values()} == {source for source in sources if "bootstrapped" in source}
    assert not sources & set(made)  # as they were published


def test_a_recipe_trains_on_what_was_written(done, parts, tmp_path):
    """The mixture of the pre-training recipes in small: each web source as capfilt left it."""
    output, _ = done
    data = load_recipe(RECIPES / "pretrain-stage1-vit-l.yaml").data
    sources = {}
    for source, weight in data.sources.items():
        if is_benchmark(source):
            assert weight is None
            shutil.copytree(Path(parts.images).parent, tmp_path / source[:2])
            sources[str(tmp_path / source[:2] / Path(parts.images).name)] = None
            continue
        folder = tmp_path / Path(source).parent.relative_to("/data")
        shutil.copytree(output, folder)
        sources[str(folder / Path(source).name)] = weight / 1e6
    assert len(sources) == 6
    # More equal shares, so that each is drawn.
    small = replace(data, train=sources, temperature=8.0, batch_size=2, num_workers=0, max_length=30)
    train(parts.recipe(tmp_path / "run", data=vars(small), training={"max_steps": 30, "save_steps": 30}))
    last = read_metrics(tmp_path / "run")[-1]
    assert set(last["samples_seen"]) == set(sources) and min(last["samples_seen"].values()) > 0
    assert last["skipped"] == 0


def test_scores_are_those_of_the_ranker(done, runs):
    from blip2.pipelines import load

    output, _ = done
    model = load(runs["stage1"], "cpu")
    members = read_tar(output / "00001.tar")
    for name in ("0000", "0003"):
        about = json.loads(members[f"{name}.json"])
        wanted = model.similarity(members[f"{name}.png"], about["captions"])[0].tolist()
        assert about["scores"] == pytest.approx(wanted, abs=1e-5)


def test_filters(runs, shards, tmp_path):
    """Every kept caption has the scores of the models, and they are within the limits."""
    from blip2.pipelines import load

    captioner, ranker = load(runs["llama"], "cpu"), load(runs["stage1"], "cpu")
    given = [sample for n in range(2) for sample in read_unit(Unit(str(n), str(shards / f"0000{n}.tar")))]
    originals = captioner.rank([each.image for each in given], [each.captions for each in given], by="pmi")
    limit = statistics.median(candidate.score for group in originals for candidate in group)
    rules = SelectionRules(keep=5, min_itm=0.01, min_pmi=limit)
    metrics = run(runs, shards / "0000[01].tar", tmp_path, replace(CONFIG, rules=rules))
    assert "not about the image (PMI)" in metrics["dropped"]
    members = read_tar(next(tmp_path.glob("*.tar")))
    name = next(name for name in members if name.endswith("json"))
    about, image = json.loads(members[name]), members[name.replace("json", "png")]
    assert about["itm"] == pytest.approx(ranker.match(image, about["captions"])[0].tolist(), abs=1e-4)
    blank = captioner.encode_pixels(torch.zeros(1, 3, 32, 32))
    prompts = [captioner.config.language.prompt] * len(about["captions"])
    zeros = [0] * len(prompts)
    seen, unseen = (
        captioner.log_likelihood(each, prompts, about["captions"], zeros).tolist()
        for each in (captioner.encode_images(image), blank)
    )
    assert about["pmi"] == pytest.approx([a - b for a, b in zip(seen, unseen, strict=True)], abs=1e-3)
    for each in metadata_of(*tmp_path.glob("*.tar")):
        assert min(each["itm"]) >= 0.01 and min(each["pmi"]) >= limit - 1e-4
    counts, rates, dropped = metrics["counts"], metrics["keep_rates"], metrics["dropped_by_origin"]
    for origin in ("original", "generated"):
        kept, rest = (counts.get(f"captions, {origin}, {what}", 0) for what in ("kept", "dropped"))
        assert rates[origin] == pytest.approx(kept / (kept + rest), abs=1e-4)
        assert sum(count for reason, count in dropped.items() if reason.startswith(origin)) == rest
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Keep rates</h2>" in page and "dropped: not about the image (PMI)" in page


def test_filters_need_models_of_this_project(runs, shards, blip, clip, tmp_path):
    config = replace(CONFIG, rules=SelectionRules(min_itm=0.5))
    with pytest.raises(InputError, match=r"--min-itm needs a ranker with a matching head .* is a dual encoder: give a"):
        run(runs, shards / "*.tar", tmp_path / "a", config, ranker=clip)
    config = replace(CONFIG, rules=SelectionRules(min_pmi=0.5))
    with pytest.raises(InputError, match=r"--min-pmi needs a captioner of stage 2, but .* is another model of transf"):
        capfilt(blip, str(runs["stage1"]), str(shards / "*.tar"), tmp_path / "b", config, engine=ONE, device="cpu")


def test_the_report(done):
    output, metrics = done
    page = (output / "report.html").read_text()
    assert "histograms of scores" in page or "plots need" in page
    assert page.count('class="card"') == 12
    assert json.loads((output / "metrics.json").read_text())["counts"] == metrics["counts"]


def test_what_is_done_is_not_done_again(done, runs, shards, tmp_path, monkeypatch):
    output, metrics = done
    again = tmp_path / "again"
    shutil.copytree(output, again)
    for name in ("00001.tar", "00001.stats.json", "00002.stats.json"):  # killed in 1, and between two files of 2
        (again / name).unlink()
    (again / f"00001.tar.{'0' * 32}.tmp").write_bytes(b"half")
    times = {path: path.stat().st_mtime_ns for path in again.glob("0000[03].*")}
    asked = []
    monkeypatch.setattr(units_module, "read_unit", lambda unit: asked.append(unit.name) or read_unit(unit))
    assert run(runs, shards / "*.tar", again) == metrics
    assert asked == ["00001", "00002"]
    assert tars(again) == tars(output)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert list(again.glob("*.tmp")) == []
    # Nor are models loaded where nothing is left.
    monkeypatch.setattr(module, "open_captioner", None)
    assert run(runs, shards / "*.tar", again) == metrics
    with pytest.raises(InputError, match="contains another pass, whose config"):
        run(runs, shards / "*.tar", again, CapFiltConfig())


def test_samples_are_of_the_image_not_of_its_neighbors(done, runs, shards, tmp_path):
    """The same images in other shards, one of them broken, get the same captions."""
    output, _ = done
    members = [(name, data) for n in (2, 0) for name, data in read_tar(shards / f"0000{n}.tar").items()]
    moved = {f"{at // 2:03}.{name.split('.')[1]}": data for at, (name, data) in enumerate(members)}
    write_tar(tmp_path / "all.tar", {"xxx.png": b"\x89PNG broken", "xxx.txt": b"no", **moved})
    metrics = run(runs, tmp_path / "all.tar", tmp_path / "output")
    assert metrics["skipped"] == {"image not decoded": 1}

    def captions(*paths):
        return [about["captions"] for about in metadata_of(*paths)]

    assert captions(tmp_path / "output" / "all.tar") == captions(output / "00002.tar", output / "00000.tar")


def test_images_that_cannot_be_used_are_counted_and_named(runs, tmp_path):
    good = encoded("disc", "red")
    write_tar(
        tmp_path / "a.tar",
        {
            "0.png": good, "0.txt": b"a red disc",
            "1.png": good[:100], "1.txt": b"cut short",
            "2.txt": b"no image",
            "3.png": good, "3.json": b"{no",
            "4.png": good,
            "5.png": good, "5.json": b'{"captions": ["half of a \\ud83d pair"]}',
            "6.png": good, "6.txt": b"un caf\xe9",
            "7.png": good, "7.json": b'{"captions": {"text": "a red disc"}}',
        },
    )  # fmt: skip
    members = {f"{n}.{kind}": good if kind == "png" else b"x" for n in range(3) for kind in ("png", "txt")}
    whole = write_tar(tmp_path / "b.tar", members).read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[: 9 * 512 + 20])  # each member is a header and a block
    (tmp_path / "c.tar").write_bytes(b"")
    metrics = run(runs, tmp_path / "?.tar", tmp_path / "output")
    assert metrics["skipped"] == {"image not decoded": 1, "no image": 1, "caption not read": 3, "shard broken": 2}
    # A .json that is none says nothing: its image is one without a caption.
    assert metrics["counts"]["images"] == 5 and metrics["counts"]["with an original"] == 3
    assert sorted(tars(tmp_path / "output")) == ["a.tar", "b.tar"]  # an empty one would be taken for a broken one
    named = " ".join(f"{key} {why}" for key, why in metrics["skipped_first"])
    assert "1 in" in named and "is damaged" in named and "c.tar cannot be read to its end" in named
    assert "5 in" in named and "holds half of a surrogate pair" in named and "the byte 0xe9" in named
    assert "captions holds an object with the keys text" in named
    assert "2 in" in named and "the sample has txt, expected an image" in named
    assert "is damaged" in (tmp_path / "output" / "report.html").read_text()


def test_an_image_without_a_caption_within_the_limits_is_left_out(runs, tmp_path):
    write_tar(
        tmp_path / "a.tar",
        {"0.png": encoded("disc", "red"), "0.txt": b"x", "1.png": encoded("disc", "blue"), "1.txt": b"y z"},
    )
    config = CapFiltConfig(num_captions=0, rules=SelectionRules(min_words=2))
    metrics = run(runs, tmp_path / "a.tar", tmp_path / "output", config)
    assert metrics["skipped"] == {"no caption left": 1}
    assert metrics["dropped"] == {"too short": 1}
    assert sorted(read_tar(tmp_path / "output" / "a.tar")) == ["1.json", "1.png"]


def test_a_table_is_cut_into_shards(runs, parts, clip, tmp_path):
    metrics = run(runs, parts.images, tmp_path / "output", ranker=clip)
    assert [len(read_tar(tmp_path / "output" / f"0000{n}.tar")) for n in range(3)] == [20, 20, 8]
    assert metrics["counts"]["with an original"] == 24
    records = list(open_records(str(tmp_path / "output" / "*.tar"), DataConfig(train="")).read())
    images = [record.image for record in open_records(parts.images, DataConfig(train=""))]
    assert [record.image for record in records] == [Path(image).read_bytes() for image in images]


def test_shards_of_several_folders_have_names_of_their_own(tmp_path):
    for number in range(2):
        (tmp_path / f"part{number}").mkdir()
        write_tar(tmp_path / f"part{number}" / "0.tar", {"0.png": encoded("disc", "red"), "0.txt": b"x"})
    units = list_units(str(tmp_path / "part{0..1}" / "0.tar"), 5)
    assert [unit.name for unit in units] == ["part0-0", "part1-0"]
    assert list(read_unit(units[0])) == [Sample("0", encoded("disc", "red"), ("x",), "png")]


def test_shards_in_object_storage_are_units(tmp_path):
    data = write_tar(tmp_path / "0.tar", {"0.png": encoded("disc", "red"), "0.txt": b"x"}).read_bytes()
    for number in range(2):
        fsspec.filesystem("memory").pipe(f"/units/part{number}/0.tar", data)
    units = list_units("memory://units/part{0..1}/0.tar", 5)
    assert [(unit.name, unit.source) for unit in units] == [
        ("part0-0", "memory://units/part0/0.tar"), ("part1-0", "memory://units/part1/0.tar")
    ]  # fmt: skip
    assert list(read_unit(units[1])) == [Sample("0", encoded("disc", "red"), ("x",), "png")]


def test_shards_that_would_have_one_output_are_refused():
    for name in ("a/b-c.tar", "a-b/c.tar", "x/c.tar"):
        fsspec.filesystem("memory").pipe(f"/twice/{name}", b"")
    with pytest.raises(InputError, match=r"c\.tar and .*c\.tar would have the same output shard, a-b-c\.tar: rename"):
        list_units("memory://twice/*/*.tar", 5)


def test_settings_that_cannot_be():
    with pytest.raises(InputError, match="--num-beams is 2, expected at least the number of captions, 3: raise"):
        CapFiltConfig(num_captions=3, decoding=Decoding(num_beams=2))
    with pytest.raises(InputError, match="--num-workers needs the engine ray"):
        Engine(num_workers=2)
    with pytest.raises(InputError, match="num_threads is 1025, expected at most 1024"):
        Engine(num_threads=1025)
