"""Scripts of benchmarks/claims that begin with a shared stage 1, with tiny models in place of the demo's."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from fixtures.claims import load_script, read_results, run


def test_itg(small, claims, tmp_path, monkeypatch, capsys):
    """What several claims have in common is trained once, and a script that was killed continues."""
    module, output = small("itg"), claims / "itg"
    score, scored = module.matching_accuracy, []

    def stop(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "matching_accuracy", stop)
    with pytest.raises(KeyboardInterrupt):
        run(module, monkeypatch, "--quick", "--seeds", "0", "--output", output)
    names = [output / "done" / "train-without-itg-0.json", claims / "shared-quick" / "done" / "train-stage1-2-0.json"]
    done = {path: path.stat().st_mtime_ns for path in names}
    monkeypatch.setattr(module, "matching_accuracy", lambda *given: scored.append(given) or score(*given))
    run(module, monkeypatch, "--quick", "--seeds", "0", "--output", output)
    assert all(path.stat().st_mtime_ns == time for path, time in done.items()) and len(scored) == 2
    found = read_results(output)
    assert set(found["scores"]) == {"ITC + ITM", "ITC + ITM + ITG"} and set(found["scores"]["ITC + ITM"]) == {"0"}
    assert found["seconds"] > 0 and found["seconds_of_shared_models"] > 0
    recall = found["scores"]["ITC + ITM"]["0"]["text_to_image_r5"]
    assert f"| {100 * recall:.1f} |" in (output / "table.md").read_text()
    assert (output / "itg.png").read_bytes().startswith(b"\x89PNG")
    # The losses of the runs differ in ITG alone.
    for name, losses in (
        ("itg/runs/without-itg-0", {"itc", "itm"}),
        ("shared-quick/runs/stage1-2-0", {"itc", "itm", "itg"}),
    ):
        row = json.loads((claims / name / "metrics.jsonl").read_text().splitlines()[0])
        assert losses == {"itc", "itm", "itg"} & set(row), name
    with pytest.raises(SystemExit):
        run(module, monkeypatch, "--output", output)
    assert (
        "has other results, of other options, recipes or scenes: give an --output in another folder"
        in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        run(module, monkeypatch, "--output", tmp_path / "new", "--scale", "0")
    assert "--scale is 0, expected a number above 0" in capsys.readouterr().err


def test_questions(small, claims, monkeypatch, capsys):
    module, output = small("questions"), claims / "questions"
    run(module, monkeypatch, "--quick", "--seeds", "0", "--output", output)
    scores = read_results(output)["scores"]
    assert set(scores) == {*module.VARIANTS, "no image"}
    # Of the eight questions that are asked, those about colors have four answers, each as frequent as the others.
    assert scores["no image"][""]["what"] == 1
    for reads, start in ((True, ["stage2-0", "stage1-2-0"]), (False, ["stage2-0"])):
        recipe = (output / "runs" / f"reads-{reads}-0" / "recipe.yaml").read_text()
        assert f"use_qformer_text_input: {str(reads).lower()}" in recipe and all(name in recipe for name in start)
    with pytest.raises(SystemExit):  # the runs with seed 0 began with stage 2 of seed 0
        run(module, monkeypatch, "--quick", "--seeds", "1", "0", "--output", output)
    assert "has other results" in capsys.readouterr().err


def test_stages(small, claims, monkeypatch):
    module, output = small("stages"), claims / "stages"
    monkeypatch.setattr(module, "VARIANTS", ("with stage 1",))
    run(module, monkeypatch, "--quick", "--seeds", "0", "--output", output)
    found = read_results(output)
    assert set(found["scores"]) == {"with stage 1"}
    assert set(found["levels"]) == {"guessing", "SmolLM2 reads the true caption"}
    assert found["levels"]["SmolLM2 reads the true caption"] in {n / 8 for n in range(9)}  # of eight questions
    assert "stage1-2-0" in (output / "runs" / "with-stage-1-0" / "recipe.yaml").read_text()
    assert "| with stage 1 |" in (output / "table.md").read_text() and (output / "stages.png").is_file()


def test_stages_of_a_t5_that_learns_from_text(small, claims, monkeypatch):
    """It answers from captions, decodes to their words, and answers some questions by guessing in stage 2."""
    module, output = small("stages"), claims / "stages-t5"
    common, text_t5 = sys.modules["common"], sys.modules["text_t5"]
    monkeypatch.setattr(text_t5, "SIZES", {"t5": text_t5.SIZES["t5-tiny"]})
    monkeypatch.setattr(text_t5, "BATCH_SIZE", 16)
    monkeypatch.setattr(module, "VARIANTS", ("without stage 1",))
    monkeypatch.setattr(common.Claim, "steps", lambda self, number: 80 if number == text_t5.STEPS else 2)
    run(module, monkeypatch, "--quick", "--seeds", "0", "--llm", "t5", "--output", output)
    found = read_results(output)
    assert found["levels"]["the T5 reads the true caption"] > 0.5
    each = found["scores"]["without stage 1"]["0"]
    assert set(each["accuracy"]) == {"1", "2"} and set(each["by_type"]) == {"color", "what"}
    # Of eight questions, in turns of both types.
    assert each["accuracy"]["2"] == sum(each["by_type"].values()) / 2 in {n / 8 for n in range(1, 9)}
    assert f"| without stage 1 | {100 * each['accuracy']['1']:.1f} |" in (output / "table.md").read_text()
    assert "start_from: null" in (output / "runs" / "without-stage-1-0" / "recipe.yaml").read_text()
    tokenizer = text_t5.make_tokenizer(["A cat, on red."])
    ids = tokenizer("a cat on red.")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" .", ".") == "a cat on red."


def test_encoders(small, claims, monkeypatch):
    module, output = small("encoders"), claims / "encoders"
    monkeypatch.setattr(module, "SMALL_IMAGES", 16)
    monkeypatch.setattr(module, "VARIANTS", {"tiny T5": ("t5-tiny", 16)})
    monkeypatch.setattr(sys.modules["text_t5"], "BATCH_SIZE", 8)
    run(module, monkeypatch, "--quick", "--seeds", "0", "--output", output)
    found = read_results(output)
    assert set(found["scores"]) == set(found["answers_from_true_captions"]) == set(module.VARIANTS)
    assert {*module.SCORES, *module.ANSWERS} <= set(found["scores"]["tiny T5"]["0"])
    assert module.load_stage2(output / "runs" / "t5-tiny-16-0").model.vision.num_tokens == 5


# -- bridges -----------------------------------------------------------------------------------------------------------


def test_a_grid_bridge():
    module = load_script("bridges")
    features = torch.arange(16.0).view(1, 16, 1).expand(2, 16, 3)
    pooled = module.GridBridge(3, 5, side=2)
    with torch.no_grad():
        pooled.linear.weight.fill_(1 / 3)
        pooled.linear.bias.zero_()
        # Means of the four corners of the grid of 4 x 4; a class token before it is left out.
        expected = torch.nn.functional.gelu(torch.tensor([2.5, 4.5, 10.5, 12.5]))
        for given in (features, torch.cat([torch.full((2, 1, 3), 99.0), features], dim=1)):
            assert torch.allclose(pooled(given)[1, :, 0], expected)
    assert module.GridBridge(3, 5, side=None)(features).shape == (2, 16, 5)


def test_bridges(small, claims, monkeypatch):
    module, output = small("bridges"), claims / "bridges"
    monkeypatch.setattr(module, "VARIANTS", (module.QFORMER, module.MLP, module.POOLING))
    run(module, monkeypatch, "--quick", "--seeds", "0", "--output", output)
    scores = read_results(output)["scores"]
    tokens = {variant: each["0"]["tokens"] for variant, each in scores.items()}
    assert tokens == {"Q-Former": 4, "MLP": 17, "pooling, MLP": 16}
    sizes = {variant: each["0"]["parameters"] for variant, each in scores.items()}
    # Norm of the features, first layer, projection.
    assert sizes["MLP"] == sizes["pooling, MLP"] == 2 * 24 + (24 * 32 + 32) + (32 * 32 + 32) < sizes["Q-Former"]
    assert all(each["0"]["lm"] > 0 for each in scores.values())
    assert "| pooling, MLP | 16 | 0.0M |" in (output / "table.md").read_text()


def test_fit_continues_where_it_was_killed(tmp_path):
    common = load_script("common")
    config = replace(common.load_recipe(common.find_recipe("demo-stage2")).optimizer, learning_rate={"*": 1e-2})

    def learn(state, kill_at=None):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))

        def loss_of(step):
            if step == kill_at:
                raise KeyboardInterrupt
            return model(torch.randn(5, 3, generator=torch.Generator().manual_seed(step))).square().mean()

        try:
            common.fit(model, config, 60, 3, loss_of, state)
        except KeyboardInterrupt:
            return None
        assert not model.training
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    whole = learn(tmp_path / "whole.pt")
    assert learn(tmp_path / "killed.pt", kill_at=40) is None
    assert torch.equal(learn(tmp_path / "killed.pt"), whole)
    assert torch.equal(learn(tmp_path / "killed.pt", kill_at=0), whole)  # all steps are done


# -- in-context examples -----------------------------------------------------------------------------------------------


def test_episodes():
    module = load_script("shots")
    by_color = [np.arange(10 * color, 10 * color + 10) for color in range(8)]
    words = torch.arange(20).view(10, 2)
    drawn = module.draw_episodes(np.random.default_rng(0), by_color, words, 200, 2, given=False)
    assert drawn.images.shape == (200, 3) and drawn.words.shape == (200, 3, 2)
    colors, named = drawn.images // 10, drawn.words[:, :, 0]
    assert (colors[:, 0] != colors[:, 1]).all()
    for i in range(2):  # the word belongs to the color within an episode, and to no color in all of them
        assert ((colors[:, i] == colors[:, 2]) == (named[:, i] == named[:, 2])).all()
    assert len({(int(c), int(w)) for c, w in zip(colors[:, 0], named[:, 0], strict=True)}) > 60
    shown = (colors[:, :2] == colors[:, 2:]).any(dim=1).float().mean()
    assert 0.35 < shown < 0.65
    drawn = module.draw_episodes(np.random.default_rng(0), by_color, words, 50, 3, given=True)
    assert (drawn.images[:, :3] // 10 == drawn.images[:, 3:] // 10).any(dim=1).all()


def test_an_episode_is_read_as_chat_reads_it(runs, parts):
    """Images and texts take turns: the LLM's states are those of the whole sequence in one piece."""
    module = load_script("shots")
    pipeline = module.load_stage2(runs["llama"])
    features = torch.randn(3, *pipeline._feature_shape, generator=torch.Generator().manual_seed(0))
    words = module.Words.make(pipeline.tokenizer)
    assert len(words.test) == module.NUM_WORDS == len(set(words.test[:, 0].tolist()))
    assert not set(words.train[:, 0].tolist()) & set(words.test[:, 0].tolist())
    episodes = module.Episodes(torch.tensor([[2, 0, 1]]), words.test[None, :3])
    with torch.no_grad():
        states, tokens, _ = module.Reader(pipeline, features).read(episodes, first_only=False)
        language, visual = pipeline.model.language, pipeline.model.visual_prompt(features)
        before, after = (torch.tensor(pipeline.tokenizer(text)["input_ids"]) for text in (module.BEFORE, module.AFTER))
        pieces = []
        for image, word in zip((2, 0, 1), words.test[:3], strict=True):
            pieces += [visual[image], *(language.embed(ids[None])[0] for ids in (before, word, after))]
        whole = language.network.model(inputs_embeds=torch.cat(pieces)[None]).last_hidden_state[0]
    end = sum(map(len, pieces)) - len(after)
    assert torch.equal(tokens, words.test[2])
    assert torch.allclose(states, whole[end - len(tokens) - 1 : end - 1], atol=1e-5)


def test_shots(small, claims, monkeypatch):
    module, output = small("shots"), claims / "shots"
    run(module, monkeypatch, "--quick", "--seeds", "0", "--output", output)
    scores = read_results(output)["scores"]
    assert set(scores) == {"pairs alone", "pairs, then episodes"}
    assert all(set(each["0"]) == {"0", "1", "2", "4"} for each in scores.values())
    state = torch.load(output / "runs" / "episodes-0" / "state.pt", weights_only=True)
    assert state["step"] == 2 and not any(name.startswith(("language", "vision")) for name in state["weights"])
    before = dict(module.load_stage2(output / "runs" / "pairs-0").model.named_parameters())
    assert any(not torch.equal(weight, before[name]) for name, weight in state["weights"].items())
    assert "| reads the examples, guesses else | 12.5 | 34.4 | 56.2 | 100.0 |" in (output / "table.md").read_text()


# -- results of earlier runs -------------------------------------------------------------------------------------------


def test_results_of_other_scenes_or_recipes_are_refused(tmp_path, monkeypatch):
    common = load_script("common")
    monkeypatch.setattr(common, "fetch", lambda name: tmp_path / "scenes-1")
    assert common.is_same_plan(tmp_path, {"scale": 1.0}) and common.is_same_plan(tmp_path, {"scale": 1.0})
    assert not common.is_same_plan(tmp_path, {"scale": 2.0})
    monkeypatch.setattr(common, "fetch", lambda name: tmp_path / "scenes-2")
    assert not common.is_same_plan(tmp_path, {"scale": 1.0})
    monkeypatch.setattr(common, "fetch", lambda name: tmp_path / "scenes-1")
    monkeypatch.setattr(common, "dump_config", lambda recipe: "changed")
    assert not common.is_same_plan(tmp_path, {"scale": 1.0})


def test_runs_that_are_compared_have_one_precision(tmp_path, monkeypatch):
    common = load_script("common")
    found = []
    for precision in ("bf16", "fp32"):  # of a machine on which both are equally fast
        monkeypatch.setattr(common, "faster_precision", lambda precision=precision: precision)
        recipe = common.demo_recipe("stage1", tmp_path / "run", tmp_path / "features", 0, 2, "train.jsonl")
        found.append(recipe.training.precision)
    assert found == ["bf16", "bf16"]


def test_quick_runs_are_not_taken_for_full_ones(tmp_path):
    common = load_script("common")
    shared = {common.Claim(tmp_path / "itg", [0], 1.0, quick).shared for quick in (False, True)}
    assert shared == {tmp_path / "shared", tmp_path / "shared-quick"}


def test_a_table_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    common = load_script("common")

    def stop(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common.os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            common.write_rows(tmp_path / "table.jsonl", [{"a": 1}])
    assert not (tmp_path / "table.jsonl").exists()
    common.write_rows(tmp_path / "table.jsonl", [{"a": 1}, {"a": 2}])
    assert (tmp_path / "table.jsonl").read_text() == '{"a": 1}\n{"a": 2}\n'


# -- output ------------------------------------------------------------------------------------------------------------


def test_a_table_has_means_and_spreads():
    common = load_script("common")
    scores = {"one": {"0": {"recall": 0.1}, "1": {"recall": 0.3}}, "no seeds": {"": {"recall": 0.5}}}
    expected = "| variant | R@1 |\n|---|---:|\n| one | 20.0 ± 14.1 |\n| no seeds | 50.0 |"
    assert common.score_table("variant", scores, {"recall": "R@1"}) == expected
