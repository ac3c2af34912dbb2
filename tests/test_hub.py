import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard

from blip2.checkpoint import CHECKPOINTS_FOLDER, open_checkpoint, read_recipe
from blip2.config import LanguageConfig, VisionConfig
from blip2.convert import convert
from blip2.data.assets import ASSETS
from blip2.errors import InputError
from blip2.hub import UNKNOWN_LICENSE, find_license, model_card, push_to_hub
from blip2.pipelines import load
from blip2.recipe import dump_config, load_recipe, override
from blip2.training.metrics import read_metrics
from blip2.training.trainer import train

FORMATS = ("transformers", "vllm", "lavis", "blip2")


@pytest.fixture(scope="session")
def measured(parts, tmp_path_factory):
    """A run of stage 1 whose losses on held-out pairs were measured after steps 2 and 3."""
    run = tmp_path_factory.mktemp("measured") / "stage1"
    short = {
        "max_steps": 3,
        "save_steps": 1,
        "save_total_limit": 3,
        "eval_steps": 2,
        "device": "cpu",
        "precision": "fp32",
    }
    train(parts.recipe(run, training=short, data={"validation": parts.images}))
    return run


@pytest.fixture
def foreign(runs):
    """A checkpoint of transformers that the hub has."""
    name = "Salesforce/blip2-opt-2.7b"
    found = open_checkpoint(str(runs["llama"]))
    config = replace(
        found.config,
        vision=VisionConfig(name=name),
        language=LanguageConfig(name=name),
        qformer=replace(found.config.qformer, bert=None),
    )
    return replace(found, name=name, format="transformers", description="transformers' Blip2 with OPT", config=config)


def blocks(card, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)


def table(card, head):
    """The rows of the first table whose heads begin with a text."""
    lines = card.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {head}"))
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:end]]
    return rows[:1] + rows[2:]


# -- the card ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stage1", "llama"])
@pytest.mark.parametrize("to", FORMATS)
def test_front_matter(runs, name, to):
    data = ModelCard(model_card(open_checkpoint(str(runs[name])), to)).data
    assert data.library_name == {"vllm": "transformers"}.get(to, to)
    assert data.pipeline_tag == ("image-to-text" if name == "llama" else "zero-shot-image-classification")
    assert "blip-2" in data.tags
    assert (data.license, data.license_name) == ("other", "see-frozen-parts")
    assert data.base_model is None  # the parts are local folders


@pytest.mark.parametrize("name", ["stage1", "llama"])
def test_card_says_what_was_trained_on_what_with_which_recipe(runs, parts, tmp_path, name):
    found = open_checkpoint(str(runs[name]))
    card = model_card(found, "transformers")
    assert f"Trained on `{parts.images}`; no pairs were held out." in card
    assert f"started from the BERT `{parts.bert}`" in card
    losses = "ITC + ITM + ITG" if name == "stage1" else "the language modeling loss of the captions"
    assert f"Training ran for 3 of 3 steps, each with 4 pairs, with AdamW on {losses}." in card
    (recipe,) = blocks(card, "yaml")
    assert yaml.safe_load(recipe)["data"]["train"] == parts.images
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert load_recipe(tmp_path / "recipe.yaml") == read_recipe(found)
    assert blocks(card, "sh") == ["blip2 train recipe.yaml\n"]
    assert "arXiv:2301.12597" in card


def test_card_says_where_training_started_and_how_large_a_step_was(runs, tmp_path):
    folder = tmp_path / "step-00000003"
    shutil.copytree(runs["llama"] / CHECKPOINTS_FOLDER / folder.name, folder)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "positions": state["positions"] * 8}))
    changes = {"start_from": "Salesforce/blip2-itm-vit-g", "training.gradient_accumulation_steps": 2}
    recipe = override(load_recipe(folder / "recipe.yaml"), changes)
    (folder / "recipe.yaml").write_text(dump_config(recipe))
    found = open_checkpoint(str(folder))
    card = model_card(found, "blip2")
    assert "started from the weights of `Salesforce/blip2-itm-vit-g`" in card
    assert "each with 64 pairs, with" in card
    assert blocks(card, "sh") == ["torchrun --nproc_per_node 8 --no-python blip2 train recipe.yaml\n"]
    assert ["checkpoint that training started from", "`Salesforce/blip2-itm-vit-g`", "mit"] in table(card, "part")
    assert "No results were measured." in card  # it does not lie in its run
    (folder / "state.json").unlink()
    assert "each with 8 pairs per process, with" in model_card(found, "blip2")


@pytest.mark.parametrize("step", [1, 2, 3])
def test_results_are_those_of_the_step(measured, step):
    card = model_card(open_checkpoint(str(measured / CHECKPOINTS_FOLDER / f"step-{step:08d}")), "transformers")
    line = read_metrics(measured)[step - 1]
    assert line["step"] == step
    heads, *rows = table(card, " |")
    assert heads[1:] == [f"training batch, step {step}", f"held-out pairs, step {step}"][: 1 if step == 1 else 2]
    assert {"itc", "itm", "itg", "itm_accuracy"} <= {row[0] for row in rows}
    for name, *values in rows:
        wanted = [line.get(name), line.get(f"validation_{name}")][: len(values)]
        assert values == ["" if value is None else f"{value:.4g}" for value in wanted]
    assert all(any(values) for _, *values in rows)
    assert "seconds" not in card and "No results" not in card


def test_last_measurement_may_be_of_an_earlier_step(measured, tmp_path):
    """Lines that are damaged are passed over."""
    run = tmp_path / "run"
    shutil.copytree(measured, run)
    *lines, last = read_metrics(run)
    last = {name: value for name, value in last.items() if not name.startswith("validation_")}
    complete = [*lines, {**last, "itm": "x"}, last, {**last, "step": 5}, [], {"itc": 1.0}, {"step": None}]
    torn = b'\n\xff\n{"step": 4, "itc'
    (run / "metrics.jsonl").write_bytes("\n".join(map(json.dumps, complete)).encode() + torn)
    heads, *rows = table(model_card(open_checkpoint(str(run)), "transformers"), " |")
    assert heads[1:] == ["training batch, step 3", "held-out pairs, step 2"]
    assert ["itc", f"{last['itc']:.4g}", f"{lines[1]['validation_itc']:.4g}"] in rows


def test_nothing_is_said_to_be_measured_that_was_not(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs["llama"], run)
    (run / "metrics.jsonl").unlink()
    card = model_card(open_checkpoint(str(run)), "transformers")
    assert "## Results\n\n### Stage 2\n\nNo results were measured.\n\n## Parts" in card


def test_card_of_both_stages(runs):
    first, second = (open_checkpoint(str(runs[name])) for name in ("stage1", "llama"))
    card = model_card(second, "transformers", stage1=first)
    assert [yaml.safe_load(recipe)["stage"] for recipe in blocks(card, "yaml")] == ["generation", "representation"]
    write, compare = blocks(card, "python")
    assert "Blip2ForConditionalGeneration" in write and "Blip2ForImageTextRetrieval" in compare
    assert [row[0] for row in table(card, "part")[1:]] == [
        "image encoder, frozen", "LLM, frozen", "BERT that the Q-Former started from",
    ]  # fmt: skip


def test_card_of_another_format_does_not_know_the_data(foreign):
    card = model_card(foreign, "vllm")
    assert "`Salesforce/blip2-opt-2.7b` (transformers' Blip2 with OPT)" in card
    assert "does not record the training data or the recipe" in card
    assert "No results were measured." in card
    assert not blocks(card, "yaml") and "blip2 train" not in card
    data = ModelCard(card).data
    assert data.base_model == ["Salesforce/blip2-opt-2.7b"]
    assert (data.license, data.license_name) == ("mit", None)
    roles = ["image encoder, frozen", "LLM, frozen", "Q-Former"]
    assert table(card, "part")[1:] == [[role, "`Salesforce/blip2-opt-2.7b`", "mit"] for role in roles]


def test_a_license_is_stated_only_if_all_parts_have_it(foreign):
    def parts(vision, language, bert):
        config = replace(
            foreign.config,
            vision=VisionConfig(name=vision),
            language=LanguageConfig(name=language),
            qformer=replace(foreign.config.qformer, bert=bert),
        )
        return replace(foreign, format="blip2", config=config)

    # The packages' Apache-2.0 is the hub's apache-2.0.
    same = parts("package:efficientnet-lite0", "google/flan-t5-xl", "google-bert/bert-base-uncased")
    data = ModelCard(model_card(same, "blip2")).data
    assert (data.license, data.license_name) == ("apache-2.0", None)
    mixed = ModelCard(model_card(parts("openai/clip-vit-large-patch14", "google/flan-t5-xl", "nobody/bert"), "blip2"))
    assert (mixed.data.license, mixed.data.license_name) == ("other", "see-frozen-parts")
    assert mixed.data.base_model == ["openai/clip-vit-large-patch14", "google/flan-t5-xl", "nobody/bert"]
    assert UNKNOWN_LICENSE in mixed.text
    limited = parts("facebook/opt-125m", "facebook/opt-125m", None)
    assert ModelCard(model_card(limited, "blip2")).data.license == "other"


def test_card_says_which_frozen_part_was_trained_further(runs):
    found = open_checkpoint(str(runs["stage1"]))
    weights = found.weights | {"vision.network.layernorm.weight": found.weights["image_norm.weight"]}
    rows = table(model_card(replace(found, weights=weights), "transformers"), "part")
    assert rows[1][0] == "image encoder, trained further"


@pytest.mark.parametrize("name", ["stage1", "llama"])
@pytest.mark.parametrize("to", FORMATS)
def test_programs_of_the_card_compile(runs, name, to):
    card = model_card(open_checkpoint(str(runs[name])), to)
    programs = blocks(card, "python")
    assert programs or to == "vllm"
    for program in programs:
        compile(program, to, "exec")
    if to == "vllm":
        assert blocks(card, "sh")[0].startswith("vllm serve . ") and "/v1/chat/completions" in card


def run_programs(folder, parts, monkeypatch, capsys):
    """What the programs of a folder's card print, run in the folder as they stand."""
    monkeypatch.chdir(folder)
    shutil.copy(Path(parts.images).parent / "red-disc-0.png", "image.png")
    capsys.readouterr()
    for program in blocks(Path("README.md").read_text(encoding="utf-8"), "python"):
        exec(program, {})
    return capsys.readouterr().out


def test_programs_of_the_card_say_what_blip2_says(parts, runs, tmp_path, monkeypatch, capsys):
    frozen = dict.fromkeys(["vision.*", "language.*", "qformer.*", "image_norm.*"], "frozen")
    recipe = parts.recipe(
        tmp_path / "run",
        stage="generation",
        language={"name": parts.llama, "prompt": 'a "image" of'},
        start_from=str(runs["stage1"]),
        optimizer={"learning_rate": {**frozen, "*": 1e-3}},
        training={"max_steps": 1, "device": "cpu", "precision": "fp32"},
    )
    train(recipe)
    convert(tmp_path / "run", tmp_path / "mine", "transformers", stage1=runs["stage1"])
    printed = run_programs(tmp_path / "mine", parts, monkeypatch, capsys)
    written, cosine, probability = re.fullmatch(
        r'a "image" of(.*)\ncosine: (.*)\nprobability that they match: (.*)\n', printed, re.DOTALL
    ).groups()
    (caption,) = load(tmp_path / "run").caption("image.png")
    assert written == caption
    judge = load(runs["stage1"])
    assert float(cosine) == pytest.approx(judge.similarity("image.png", "a text").item(), abs=1e-5)
    assert float(probability) == pytest.approx(judge.match("image.png", "a text").item(), abs=1e-5)


@pytest.mark.parametrize(("name", "to"), [("stage1", "transformers"), ("stage1", "blip2"), ("llama", "blip2")])
def test_programs_of_the_card_run(parts, runs, tmp_path, monkeypatch, capsys, name, to):
    convert(runs[name], tmp_path / "mine", to)
    assert run_programs(tmp_path / "mine", parts, monkeypatch, capsys)


# -- licenses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "license"),
    [
        ("facebook/opt-2.7b", "other (OPT-175B license: research that is not commercial)"),
        ("google/flan-t5-xl", "apache-2.0"),
        ("google-bert/bert-base-uncased", "apache-2.0"),
        ("openai/clip-vit-large-patch14", "mit"),
        ("Salesforce/blip2-itm-vit-g", "mit"),
        ("/models/eva_vit_g.pth", "mit"),
        ("package:minilm", "Apache-2.0"),
        ("package:tuxpaint-stamps/train.jsonl", "GPL-2"),
        ("package:nothing", None),
        ("nobody/nothing", None),
        ("timm:nothing", None),
        ("/no/such/folder", None),
    ],
)
def test_licenses_that_are_known(name, license):
    assert find_license(name) == license


def test_every_asset_has_a_license():
    assert all(find_license(f"package:{name}") == asset.license for name, asset in ASSETS.items())


@pytest.mark.parametrize(
    ("readme", "license"),
    [
        ("---\nlicense: bsd-3-clause\n---\n# A model", "bsd-3-clause"),
        ("---\nlicense: other\nlicense_name: my-license\n---\n", "other (my-license)"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "mit, apache-2.0"),
        ("---\ntags: [a]\n---\n", None),
        ("# A model without front matter\n", None),
        ("---\n- a list\n---\n", None),
        ("---\nlicense: [broken\n---\n", None),
        (b"---\nlicense: \xff\n---\n", None),
    ],
)
def test_license_by_a_folder_s_own_readme(tmp_path, readme, license):
    (tmp_path / "README.md").write_bytes(readme if isinstance(readme, bytes) else readme.encode())
    assert find_license(str(tmp_path)) == license


# -- the hub -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(runs, tmp_path):
    """A folder as it is published."""
    source = next((runs["stage1"] / CHECKPOINTS_FOLDER).glob("step-*3"))
    shutil.copytree(source, tmp_path / "mine", ignore=shutil.ignore_patterns("optimizer.pt"))
    (tmp_path / "mine" / "README.md").write_text(model_card(open_checkpoint(str(source)), "blip2"), encoding="utf-8")
    return tmp_path / "mine"


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(folder, repository="me/model", **options):
    with pytest.raises(InputError) as error:
        push_to_hub(folder, repository, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_files_arrive_byte_for_byte_in_one_commit(hub, folder):
    assert push_to_hub(folder, "me/model") == f"{hub.url}/me/model"
    assert hub.commits == [files(folder)]
    assert {"README.md", "model.yaml", "recipe.yaml", "model.safetensors", "tokenizer/tokenizer.json"} <= set(
        hub.commits[0]
    )
    assert [(made["name"], made["organization"], made.get("visibility")) for made in hub.created] == [
        ("model", "me", None)
    ]
    assert hub.tokens == {"Bearer hf_secret"}


def test_a_name_without_an_owner_is_one_s_own(hub, folder):
    assert push_to_hub(str(folder), "model", private=True) == f"{hub.url}/me/model"
    assert hub.created[0]["visibility"] == "private"
    assert len(hub.commits) == 1


def test_a_repository_that_is_there_is_pushed_to(hub, folder):
    hub.refuses["/api/repos/create"] = 409
    push_to_hub(folder, "me/model")
    assert hub.commits == [files(folder)]


def test_nothing_is_shown_to_others_that_was_to_be_private(hub, folder):
    hub.private = False
    assert "me/model already exists and is public" in refusal(folder, private=True)
    assert hub.commits == []


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("where", ["/api/", "/api/models/"])
def test_who_may_not_write_is_told_to_log_in(hub, folder, status, where):
    hub.refuses[where] = status
    message = refusal(folder)
    assert f"({status})" in message and "hf auth login" in message
    assert hub.commits == []


def test_other_answers_are_told(hub, folder):
    hub.refuses["/api/repos/create"] = 400
    assert "refused" in refusal(folder)


def test_hub_that_cannot_be_reached(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "ConnectError" in refusal(folder)


def test_nobody_is_logged_in(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    assert "hf auth login" in refusal(folder)
    assert hub.tokens == set()


def test_offline(hub, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(folder)


@pytest.mark.parametrize("name", ["a/b/c", "me/my model", "me--model", ".model", ""])
def test_names_that_no_repository_has(hub, folder, name):
    assert "is not a repository name" in refusal(folder, name)
    assert hub.tokens == set()


def test_folders_that_are_not_to_be_pushed(hub, folder, tmp_path):
    assert "is not a folder" in refusal(tmp_path / "nowhere")
    assert "is not a folder" in refusal(folder / "README.md")
    (folder / "README.md").unlink()
    assert "has no README.md" in refusal(folder)
    (folder / "model.yaml").unlink()
    assert "contains no model" in refusal(folder)
    (folder / "mine.pth").write_bytes(b"")
    assert "has no README.md" in refusal(folder)
    assert hub.tokens == set()


def test_license_by_the_hub_s_card(hub):
    assert find_license("somebody/model") == find_license("timm:model") == "mpl-2.0"
    hub.card = None
    assert find_license("somebody/model") is None
    hub.refuses["/"] = 404
    assert find_license("somebody/model") is None


def test_license_without_a_network(monkeypatch, hub):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert find_license("somebody/model") is None


def test_paths_of_this_file_are_not_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("models/vit").mkdir(parents=True)
    assert find_license("models/vit") is None
