"""Scripts of benchmarks/claims that train, with tiny models in place of the demo's, and a few steps."""

import json
from dataclasses import replace

import pytest
import torch

from blip2.evaluation.retrieval import evaluate_retrieval
from fixtures.claims import load_script, read_results, run

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
    assert large.steps == 100 * plan.steps and 4990 <= large.images + large.clean <= 5000


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


@pytest.mark.parametrize("every_seed", [False, True])
def test_rounds_are_made_with_the_first_seed_or_with_each(capfilt, scenes, tmp_path, monkeypatch, every_seed):
    made, measured = [], []

    class Recorder(capfilt.Experiment):
        def measure(self, name, source, seed):
            measured.append((name, seed))
            return {"itc": 0.5, "itm": 0.5, "itm_accuracy": 0.5, "chance": 0.1}

        def bootstrap(self, number, before, noisy, clean, seed):
            made.append((number, before.name, seed))
            return f"{number}-{seed}", {}

    monkeypatch.setattr(capfilt, "fetch", lambda name: scenes)
    capfilt.run(Recorder(tmp_path, replace(capfilt.QUICK, clean=3, images=9), 2), [3, 4], every_seed)
    expected = [(1, "noisy-3", 3), (2, "bootstrapped-1-of-3-3", 3)]
    expected += [(1, "noisy-4", 4), (2, "bootstrapped-1-of-4-4", 4)] if every_seed else []
    assert made == expected
    origin = 4 if every_seed else 3
    names = ["noisy", f"bootstrapped-1-of-{origin}", f"bootstrapped-2-of-{origin}", "true"]
    assert measured[4:] == [(name, 4) for name in names]


def test_capfilt(small, tmp_path, monkeypatch, capsys):
    """End to end, killed in the middle and started again."""
    module = small("capfilt")
    plan = replace(module.QUICK, images=9, clean=3)
    monkeypatch.setattr(module, "QUICK", plan)
    arguments = ["--quick", "--output", tmp_path, "--seeds", "0", "--rounds", "1"]
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
    assert len(made) == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["scores"]) == {"noisy", "round 1", "true"}
    assert all(set(each) == {"0"} for each in results["scores"].values())
    kept = results["rounds"]["round 1"]["0"]["kept_by_noise"]
    assert set(kept) == {"true", "another's", "empty"} and all(0 <= share <= 1 for share in kept.values())
    assert results["seconds"] > 0 and results["checks"]["round 1"]["accepted"] in (True, False)
    assert (tmp_path / "capfilt.png").is_file()
    assert (tmp_path / "table.md").read_text() == capsys.readouterr().out[-len((tmp_path / "table.md").read_text()) :]
    monkeypatch.setattr(module, "capfilt", None)
    run(module, monkeypatch, *arguments)  # all is done
    with pytest.raises(SystemExit):
        run(module, monkeypatch, "--output", tmp_path, "--scale", "2")
    assert "has other results, of another size, recipe or scenes: give another --output" in capsys.readouterr().err


# -- re-ranking --------------------------------------------------------------------------------------------------------


def test_reranking(small, scenes, claims, runs, monkeypatch, capsys):
    module, output = small("reranking"), claims / "reranking"
    run(module, monkeypatch, "--quick", "--seeds", "0", "--output", output)
    found = read_results(output)["models"]["0"]
    assert set(found["recall"]["twins"]) == set(module.BY)
    # A single candidate is the best by ITC; as many as there are texts are all of them.
    for recall in found["recall"]["compositions"].values():
        assert set(recall) == set(map(str, module.CANDIDATES))
        assert recall["1"] == found["itc"]["compositions"] and recall["8"] == recall["128"]
    assert all(taken > 0 for taken in found["milliseconds"].values())
    assert "| ITC alone |" in (output / "table.md").read_text()
    recipe = (output / "runs" / "twins-0" / "recipe.yaml").read_text()
    assert "stage1-2-0" in recipe and "train_twins.jsonl" in recipe
    # A given model, as the library evaluates it.
    given = claims / "reranking-given"
    run(module, monkeypatch, "--quick", "--models", runs["stage1"], "--output", given)
    found = read_results(given)["models"][str(runs["stage1"])]
    pipeline = module.load_stage1(runs["stage1"])
    rows, features = module.read_images(pipeline, "test_compositions.jsonl", 8)
    texts = [row["captions"][0] for row in rows]
    result = evaluate_retrieval(pipeline, features, texts, torch.eye(8, dtype=torch.bool), rerank_k=4)
    expected = (result.image_to_text["r1"] + result.text_to_image["r1"]) / 2
    assert found["recall"]["compositions"]["itm"]["4"] == pytest.approx(expected)
    assert (given / "reranking-given.png").is_file()
    with pytest.raises(SystemExit):
        run(module, monkeypatch, "--quick", "--output", given)
    assert "has other results, of other options" in capsys.readouterr().err


# -- the number of queries ---------------------------------------------------------------------------------------------


def test_collapse(small, claims, monkeypatch, capsys):
    module, output = small("collapse"), claims / "collapse"
    monkeypatch.setattr(module, "KINDS", {"none": "without it"})
    run(module, monkeypatch, "--quick", "--seeds", "0", "--queries", "1", "2", "--output", output)
    scores = read_results(output)["scores"]
    assert set(scores) == {"none"} and set(scores["none"]) == {"1", "2"}
    found = scores["none"]["2"]["0"]
    assert set(found) == {*module.SCORES, "chance"} and -1 <= found["cosine"] <= 1
    assert scores["none"]["1"]["0"]["cosine"] == 1
    run_folder = output / "runs" / "none-2-0"
    assert module.load_stage1(run_folder).config.qformer.num_query_tokens == 2
    assert "query_diversity: 0.0" in (run_folder / "recipe.yaml").read_text()
    assert "| without it | 2 |" in (output / "table.md").read_text() and (output / "collapse.png").is_file()
    with pytest.raises(SystemExit):
        run(module, monkeypatch, "--queries", "0", "--output", output)
    assert "--queries has 0, expected numbers of at least 1" in capsys.readouterr().err
