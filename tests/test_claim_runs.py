"""Scripts of benchmarks/claims that train, with tiny models in place of the demo's, and a few steps."""

import json
from dataclasses import replace

import pytest
import torch

from blip2.evaluation.retrieval import evaluate_retrieval
from conftest import COLORS, SHAPES, draw
from fixtures.claims import load_script, run


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Images and tables with the names of those of the scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    for split, shade in (("train", 0), ("test_compositions", 10)):
        rows = []
        for shape in SHAPES:
            for color in COLORS:
                name = f"{split}-{color}-{shape}"
                draw(shape, color, shade).save(folder / f"{name}.png")
                rows.append({"image": f"{name}.png", "caption": f"a {color} {shape}", "key": name})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}_descriptions.jsonl").write_text(text)
    return folder


# -- CapFilt -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def capfilt():
    return load_script("capfilt")


def test_noise_is_a_third_of_each_kind_and_always_the_same(capfilt):
    rows = [{"key": f"train-{i}", "caption": f"caption {i}", "image": f"{i}.jpg"} for i in range(30)]
    noisy = capfilt.make_noisy(rows)
    kinds = [row["noise"] for row in noisy]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"true": 10, "another's": 10, "empty": 10}
    assert [row["image"] for row in noisy] == [row["image"] for row in rows]
    for row, before in zip(noisy, rows, strict=True):
        assert (row["caption"] == before["caption"]) == (row["noise"] == "true")
        assert row["caption"].startswith("caption") == (row["noise"] != "empty")
    assert noisy == capfilt.make_noisy(rows) and kinds[:3] != ["true", "another's", "empty"]


def test_a_larger_plan_fits_the_scenes(capfilt):
    plan = capfilt.Plan()
    assert capfilt.scaled(plan, 1) == plan
    assert capfilt.scaled(plan, 2).images == 2 * plan.images
    large = capfilt.scaled(plan, 100)
    assert large.steps == 100 * plan.steps and 3990 <= large.images + large.clean <= 4000


def scores(*values):
    """R@1 by seed, the same by each score."""
    return {
        seed: {"itc": value, "itm": value, "itm_accuracy": value, "chance": 0.01} for seed, value in enumerate(values)
    }


def test_what_is_won_back(capfilt, tmp_path):
    found = {
        "noisy": scores(0.1, 0.2),
        "round 1": scores(0.3, 0.3),
        "round 2": scores(0.0, 0.1),
        "true": scores(0.45, 0.45),
    }
    won = capfilt.won_back(found)
    assert won["round 1"]["itc"] == pytest.approx((0.3 - 0.15) / (0.45 - 0.15))
    assert won["round 2"]["itm"] < 0
    assert capfilt.won_back({**found, "true": scores(0.1, 0.1)})["round 1"]["itc"] is None
    judged = capfilt.check(found)
    assert judged["round 1"]["accepted"] and not judged["round 2"]["accepted"]
    rounds = {
        name: {0: {"kept_by_noise": {"true": 0.9, "another's": 0.2, "empty": 0.0}, "keep_rates": {"generated": 0.5}}}
        for name in ("round 1", "round 2")
    }
    results = {"scores": found, "won_back": won, "checks": judged, "rounds": rounds}
    text = capfilt.table(results)
    assert "| round 1 | 30.0 ± 0.0 | 30.0 ± 0.0 | 30.0 ± 0.0 | 50 % | 50 % |" in text
    assert "| round 2 | 90.0 | 20.0 | 0.0 | 50.0 |" in text and "round 2: the round is refused" in text
    capfilt.draw(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_capfilt(small, tmp_path, monkeypatch, capsys):
    """End to end, killed in the middle and started again."""
    module = small("capfilt")
    plan = replace(module.QUICK, images=9, clean=3)
    monkeypatch.setattr(module, "QUICK", plan)
    arguments = ["--quick", "--output", tmp_path, "--seeds", "0", "1", "--rounds", "1"]
    made, capfilt = [], module.capfilt

    def stop(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "capfilt", stop)
    with pytest.raises(KeyboardInterrupt):
        run(module, monkeypatch, *arguments)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "done").glob("*.json")}
    assert tmp_path / "done" / "scores-noisy-0.json" in done and not (tmp_path / "results.json").exists()
    monkeypatch.setattr(module, "capfilt", lambda *given: made.append(given) or capfilt(*given))
    run(module, monkeypatch, *arguments)
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    assert len(made) == 1  # with the first seed alone
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["scores"]) == {"noisy", "round 1", "true"}
    assert all(set(each) == {"0", "1"} for each in results["scores"].values())
    kept = results["rounds"]["round 1"]["0"]["kept_by_noise"]
    assert set(kept) == {"true", "another's", "empty"} and all(0 <= share <= 1 for share in kept.values())
    assert results["seconds"] > 0 and results["checks"]["round 1"]["accepted"] in (True, False)
    assert (tmp_path / "capfilt.png").is_file()
    assert (tmp_path / "table.md").read_text() == capsys.readouterr().out[-len((tmp_path / "table.md").read_text()) :]
    monkeypatch.setattr(module, "capfilt", None)
    run(module, monkeypatch, *arguments)  # all is done
    with pytest.raises(SystemExit):
        run(module, monkeypatch, "--output", tmp_path, "--scale", "2")
    assert "has a run of another size" in capsys.readouterr().err


# -- re-ranking --------------------------------------------------------------------------------------------------------


def test_reranking(small, scenes, runs, tmp_path, monkeypatch, capsys):
    module = small("reranking")
    rows = [json.loads(line) for line in (scenes / "test_compositions_descriptions.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({"image": row["image"], "captions": [row["caption"]]}) + "\n" for row in rows)
    for name in ("train", "test_compositions", "twins"):
        (scenes / f"{name}.jsonl").write_text(text)
    run(module, monkeypatch, "--quick", "--seeds", "0", "--output", tmp_path / "trained")
    results = json.loads((tmp_path / "trained" / "results.json").read_text())
    found = results["models"]["0"]
    assert set(found["recall"]["twins"]) == {"0", *map(str, module.CANDIDATES)} and results["steps"] == 2
    # A single candidate is the best by ITC; as many as there are texts are all of them.
    recall = found["recall"]["compositions"]
    assert recall["1"] == recall["0"] and recall["8"] == recall["128"]
    assert all(taken > 0 for taken in found["milliseconds"].values())
    assert "| ITC alone |" in (tmp_path / "trained" / "table.md").read_text()
    # Of a model that is there, as the library evaluates it.
    run(module, monkeypatch, "--quick", "--models", runs["stage1"], "--output", tmp_path / "given")
    found = json.loads((tmp_path / "given" / "results.json").read_text())["models"][str(runs["stage1"])]
    pipeline = module.load_stage1(runs["stage1"])
    features = pipeline.encode_images([scenes / row["image"] for row in rows[:8]])
    texts = [row["caption"] for row in rows[:8]]
    result = evaluate_retrieval(pipeline, features, texts, torch.eye(8, dtype=torch.bool), rerank_k=4)
    expected = (result.image_to_text["r1"] + result.text_to_image["r1"]) / 2
    assert found["recall"]["compositions"]["4"] == pytest.approx(expected)
    assert (tmp_path / "given" / "reranking.png").is_file()
    with pytest.raises(SystemExit):
        run(module, monkeypatch, "--output", tmp_path / "given")
    assert "has other results: give another --output" in capsys.readouterr().err


# -- the number of queries ---------------------------------------------------------------------------------------------


def test_collapse(small, scenes, tmp_path, monkeypatch, capsys):
    module = small("collapse")
    rows = [json.loads(line) for line in (scenes / "test_compositions_descriptions.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({"image": row["image"], "captions": [row["caption"]]}) + "\n" for row in rows)
    for name in ("train", "test_compositions", "twins"):
        (scenes / f"{name}.jsonl").write_text(text)
    run(module, monkeypatch, "--quick", "--seeds", "0", "--queries", "1", "2", "--output", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["scores"]) == {"recipe", "none"} and set(results["scores"]["none"]) == {"1", "2"}
    found = results["scores"]["none"]["2"]["0"]
    assert set(found) == {*module.SCORES, "chance"} and -1 <= found["cosine"] <= 1
    pipeline = module.load_stage1(tmp_path / "runs" / "none-2-0")
    assert pipeline.config.qformer.num_query_tokens == 2
    assert "| without it | 2 |" in (tmp_path / "table.md").read_text() and (tmp_path / "collapse.png").is_file()
    with pytest.raises(SystemExit):
        run(module, monkeypatch, "--output", tmp_path)
    assert "has other results: give another --output" in capsys.readouterr().err
