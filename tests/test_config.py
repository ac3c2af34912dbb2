import ast
import inspect
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, fields, is_dataclass, replace
from functools import reduce
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from blip2 import config
from blip2.config import LanguageConfig, LoraConfig, Recipe
from blip2.errors import InputError
from blip2.recipe import dump_config, find_recipe, load_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
SECTIONS = {
    field.name: kind
    for field in fields(Recipe)
    for kind in (get_type_hints(Recipe)[field.name], *get_args(get_type_hints(Recipe)[field.name]))
    if is_dataclass(kind)
} | {"qformer.lora": LoraConfig, "language.lora": LoraConfig}
RANGES = {
    f"{name}.{field.name}": field.metadata["range"]
    for name, section in SECTIONS.items()
    for field in fields(section)
    if "range" in field.metadata
}
MINIMAL = {"stage": "representation", "output": "runs/x", "vision": {"name": "vit"}, "data": {"train": "pairs.jsonl"}}


@pytest.fixture
def write(tmp_path):
    """Writes a recipe file: the smallest one there is, changed."""

    def write(**changes):
        values = {**MINIMAL, **changes}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return path

    return write


@pytest.fixture
def smallest():
    return Recipe("representation", "runs/x", config.VisionConfig("vit"), config.DataConfig("pairs.jsonl"))


def message(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_defaults_are_the_paper_s(write):
    recipe = load_recipe(write())
    assert (recipe.qformer.num_query_tokens, recipe.qformer.hidden_size, recipe.qformer.image_text_hidden_size) == (
        32,
        768,
        256,
    )
    assert recipe.qformer.cross_attention_frequency == 2
    assert (recipe.optimizer.betas, recipe.optimizer.weight_decay) == ((0.9, 0.98), 0.05)
    assert (recipe.optimizer.learning_rate["*"], recipe.optimizer.warmup_steps) == (1e-4, 2000)
    assert recipe.training.max_steps == 250_000
    assert recipe.data.min_crop_scale == 0.5


def test_file_with_overrides(write):
    path = write(data={"train": "pairs.jsonl", "batch_size": 8, "horizontal_flip": False})
    recipe = load_recipe(
        path,
        [
            "--data.batch_size=16",
            "--output",
            "runs/y",
            "--optimizer.learning_rate",
            '{"vision.*": "frozen", "*": 2e-4}',
            "--optimizer.max_grad_norm=null",
            "--start_from=runs/z",
        ],
    )
    assert (recipe.data.batch_size, recipe.data.horizontal_flip, recipe.output) == (16, False, "runs/y")
    assert recipe.optimizer.learning_rate == {"vision.*": "frozen", "*": 2e-4}
    assert list(recipe.optimizer.learning_rate) == ["vision.*", "*"]  # the first that matches decides
    assert recipe.optimizer.max_grad_norm is None
    assert recipe.start_from == "runs/z"


@pytest.mark.parametrize(
    ("given", "starts"),
    [("null", []), ("runs/z", ["runs/z"]), ("[runs/b, runs/a]", ["runs/b", "runs/a"]), ('["b"]', ["b"])],
)
def test_starts(write, tmp_path, given, starts):
    recipe = load_recipe(write(start_from="runs/y"), ["--start_from", given])
    assert recipe.start_checkpoints == starts
    (tmp_path / "again.yaml").write_text(dump_config(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe
    path = write()
    path.write_text(path.read_text() + f"start_from: {given}\n")
    assert load_recipe(path).start_checkpoints == starts


@pytest.mark.parametrize("given", [[], [""], ["runs/a", ""], ""])
def test_starts_that_name_nothing(write, given):
    with pytest.raises(InputError, match=r"start_from is .*, expected names of runs or checkpoints: correct it"):
        load_recipe(write(start_from=given))


def test_rates_in_scientific_notation(write):
    """YAML 1.1 takes 1e-4 for a text."""
    path = write()
    path.write_text(path.read_text() + 'optimizer: {learning_rate: {"*": 1e-4}, weight_decay: 5e-2}\n')
    recipe = load_recipe(path)
    assert recipe.optimizer.learning_rate == {"*": 1e-4}
    assert recipe.optimizer.weight_decay == 0.05


def test_the_language_of_stage_two(write):
    path = write(stage="generation", language={"name": "opt"})
    recipe = load_recipe(path, ["--language.prompt=a photo of", r"--language.stop_string=\n"])
    assert recipe.language == LanguageConfig("opt", prompt="a photo of", stop_string=r"\n")
    recipe = load_recipe(path, ["--language.lora.r=4"])
    assert recipe.language == LanguageConfig("opt", lora=LoraConfig(r=4))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 1}, ["learning_rate"]),
        ({"data": {"train": "x", "batchsize": 4}}, ["batchsize"]),
        ({"optimizer": {"schedule": {"warmup": 4}}}, ["schedule"]),
        ({"stage": "pretraining"}, ["stage", "pretraining", "representation"]),
        ({"data": {"train": "x", "batch_size": "many"}}, ["data.batch_size", "many"]),
        ({"data": {"train": "x", "horizontal_flip": "perhaps"}}, ["data.horizontal_flip", "perhaps"]),
        ({"optimizer": {"learning_rate": {"*": "fast"}}}, ["optimizer.learning_rate", "fast"]),
        ({"training": {"precision": "fp8"}}, ["training.precision", "fp8"]),
        ({"training": {"report_to": ["paper"]}}, ["training.report_to", "paper"]),
        ({"output": None}, ["output"]),
        ({"vision": {"image_size": 224}}, ["vision.name"]),
        ({"data": None}, ["data.train"]),
    ],
)
def test_what_is_not_a_recipe(write, changes, words):
    path = write(**changes)
    with pytest.raises(InputError) as raised:
        load_recipe(path)
    assert str(path) in message(raised)
    assert "blip2 train --help lists all keys" in message(raised)
    for word in words:
        assert word in message(raised)


@pytest.mark.parametrize(
    ("line", "found"),
    [("seed: 010", "the number 010, which YAML reads in base 8"), ("tag: 12:30", "12:30, which YAML reads in base 60")],
)
def test_numbers_that_are_not_what_they_look_like(tmp_path, line, found):
    (tmp_path / "recipe.yaml").write_text(f"{line}\nstage: representation\n")
    with pytest.raises(InputError, match=found):
        load_recipe(tmp_path / "recipe.yaml")


def test_an_unknown_key_on_the_command_line(write):
    with pytest.raises(InputError) as raised:
        load_recipe(write(), ["--data.batchsize", "3"])
    assert "--data.batchsize" in message(raised)


@pytest.mark.parametrize("text", ["stage: [representation", "a list", "- one\n- two", "", "\t\x00"])
def test_not_a_mapping_of_yaml(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"recipe .*recipe\.yaml: ") as raised:
        load_recipe(path)
    message(raised)


BAD = [
    ("data.batch_size", 0),
    ("data.max_length", 1),
    ("data.min_crop_scale", 0.0),
    ("data.min_crop_scale", 1.5),
    ("data.num_workers", -1),
    ("data.cached_views", -1),
    ("objectives.itc", -1.0),
    ("objectives.label_smoothing", 1.5),
    ("optimizer.betas", (0.9, 1.0)),
    ("optimizer.max_grad_norm", 0.0),
    ("optimizer.layer_decay", 0.0),
    ("optimizer.layer_decay", 1.1),
    ("optimizer.min_lr_rate", -0.1),
    ("optimizer.learning_rate", {"*": -1.0}),
    ("optimizer.learning_rate", {"*": math.nan}),
    ("optimizer.warmup_steps", -1),
    ("optimizer.weight_decay", -1.0),
    ("qformer.cross_attention_frequency", 0),
    ("qformer.dropout", 1.5),
    ("qformer.num_attention_heads", 0),
    ("qformer.num_hidden_layers", 0),
    ("qformer.num_query_tokens", 0),
    ("training.gradient_accumulation_steps", 0),
    ("training.save_total_limit", 0),
    ("training.save_steps", 0),
    ("training.seed", -1),
    ("training.seed", 2**32),
    ("training.max_steps", 0),
    ("training.eval_steps", 0),
    ("vision.drop_path_rate", 1.0),
    ("vision.image_size", 0),
]


@pytest.mark.parametrize(("key", "value"), BAD)
def test_values_out_of_range(smallest, key, value):
    section, field = key.split(".")
    changed = replace(getattr(smallest, section), **{field: value})
    with pytest.raises(InputError, match=f"^{key} is .*, expected ") as raised:
        replace(smallest, **{section: changed})
    message(raised)


def test_a_value_out_of_range_on_the_command_line(write):
    with pytest.raises(InputError) as raised:
        load_recipe(write(), ["--qformer.dropout=1.5"])
    assert message(raised) == "qformer.dropout is 1.5, expected 0 to 1"


def test_every_number_has_a_range():
    """A number without one would be found out by whoever uses it, in words that no user knows."""
    numbers = {
        f"{name}.{field.name}"
        for name, section in SECTIONS.items()
        for field in fields(section)
        if re.search(r"\b(int|float)\b", str(field.type))
    }
    assert {"vision", "data", "optimizer", "evaluation"} < set(SECTIONS) and numbers == set(RANGES)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stage": "generation"}, "stage generation needs an LLM, but language is null: set language.name"),
        ({"language": {"name": "opt"}}, "stage representation has no LLM: leave out language"),
        ({"output": " "}, "output is ' ', which would be the current folder: give a name, or . for that folder"),
        ({"data": {"train": {"a": 1, "": 2}}}, "data.train is '', which would be the current folder"),
        ({"objectives": {"itc": 0, "itm": 0, "itg": 0}}, "all objectives are switched off: give one"),
        (
            {"qformer": {"num_attention_heads": 7}},
            "qformer.hidden_size 768 is not a multiple of qformer.num_attention_heads 7",
        ),
        (
            {"evaluation": {"task": "vqa", "data": "x"}},
            "evaluation.task is vqa, which a model of stage representation cannot do: set evaluation.task to retrieval",
        ),
        (
            {
                "stage": "generation",
                "language": {"name": "x"},
                "evaluation": {"task": "retrieval", "data": "x"},
            },
            "evaluation.task is retrieval, which a model of stage generation cannot do: set evaluation.task to capt",
        ),
        (
            {"training": {"metric_for_best_model": "evaluation_CIDEr"}},
            "training.metric_for_best_model is evaluation_CIDEr, which needs evaluation: set",
        ),
        (
            {"training": {"metric_for_best_model": "validation_loss"}},
            "training.metric_for_best_model is validation_loss, which needs data.validation",
        ),
        (
            {"training": {"metric_for_best_model": "loss"}},
            "training.metric_for_best_model is loss, expected a name that begins with validation_ or eval",
        ),
    ],
)
def test_what_does_not_go_together(write, changes, expected):
    with pytest.raises(InputError) as raised:
        load_recipe(write(**changes))
    assert expected in message(raised)


@pytest.mark.parametrize(
    ("rates", "trains"),
    [
        ({"vision.*": "frozen", "*": 1e-4}, False),
        ({"*": 1e-4}, True),
        ({"*": "frozen"}, False),
        ({"qformer.*": 1e-4, "*": "frozen"}, False),
        ({"qformer.*": 1e-4, "vision.*": 1e-5, "*": "frozen"}, True),
        ({"vision.network.layers.[12].*": 1e-5, "vision.*": "frozen", "*": 1e-4}, True),
        ({"vision.*": "frozen", "vision.network.layers.1.*": 1e-5, "*": 1e-4}, False),  # the first decides
        ({"vision*": 1e-5, "*": "frozen"}, True),
        ({"*.bias": 1e-5, "*": "frozen"}, True),
        ({"image_norm.*": 1e-5}, False),
    ],
)
def test_whether_a_part_trains(rates, trains):
    assert config.OptimizerConfig(learning_rate=rates).trains("vision") is trains


def test_one_objective_is_enough(write):
    recipe = load_recipe(write(objectives={"itc": 0, "itm": 0}))
    assert recipe.objectives.itg == 1.0


@pytest.mark.parametrize("stage", ["representation", "generation"])
def test_dumped_and_loaded_it_is_the_same(tmp_path, write, stage):
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    language = LanguageConfig("opt", dtype="fp16", prompt='a "photo": of', stop_string="\n", lora=lora)
    language = language if stage == "generation" else None
    recipe = replace(load_recipe(write()), stage=stage, language=language)
    recipe = replace(
        recipe,
        optimizer=replace(
            recipe.optimizer, learning_rate={"z.*": 1e-5, "vision.*": "frozen", "*": 3.3e-4}, betas=(0.5, 0.75)
        ),
        training=replace(recipe.training, report_to=["tensorboard"], precision="bf16"),
    )
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_config(recipe))
    assert load_recipe(path) == recipe
    assert list(load_recipe(path).optimizer.learning_rate) == ["z.*", "vision.*", "*"]
    assert set(yaml.safe_load(dump_config(recipe))) == {f.name for f in fields(Recipe)}


def test_find_recipe(tmp_path, monkeypatch):
    own = tmp_path / "own.yaml"
    own.write_text("")
    assert find_recipe(str(own)) == own
    monkeypatch.chdir(tmp_path)
    assert find_recipe("own.yaml") == Path("own.yaml")
    for name in ("demo-stage1", "demo-stage1.yaml", "recipes/demo-stage1.yaml"):
        assert load_recipe(find_recipe(name)).output == "runs/demo/stage1"
    with pytest.raises(InputError) as raised:
        find_recipe("demo-stage9")
    assert "no recipe 'demo-stage9'" in message(raised)
    assert all(path.stem in str(raised.value) for path in RECIPES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes(path):
    """Each can be read, and its first line is the command that runs it."""
    load_recipe(path)
    first, *_ = path.read_text().splitlines()
    assert re.match(rf"# (torchrun .* )?blip2 train recipes/{re.escape(path.name)}( |$)", first)


@pytest.mark.parametrize("character", ["\\0", "\\ud800"])
def test_characters_that_no_path_can_have(tmp_path, character):
    path = tmp_path / "recipe.yaml"
    path.write_text(f'stage: representation\noutput: "run{character}"\nvision: {{name: v}}\ndata: {{train: d}}\n')
    with pytest.raises(InputError, match=r"output is 'run.*', expected a valid text"):
        load_recipe(path)


def test_a_base(tmp_path):
    """All its keys hold but those that are given, section by section; a value is replaced as a whole."""
    (tmp_path / "lowest.yaml").write_text(
        yaml.safe_dump({**MINIMAL, "optimizer": {"learning_rate": {"a.*": 1e-3, "*": 1e-4}}})
    )
    (tmp_path / "middle.yaml").write_text("base: lowest.yaml\nstage: generation\nlanguage: {name: opt, prompt: a}\n")
    path = tmp_path / "top.yaml"
    path.write_text(
        'base: middle.yaml\nlanguage: {prompt: b}\noptimizer: {learning_rate: {"*": 5e-6}, warmup_steps: 7}\n'
    )
    recipe = load_recipe(path, ["--optimizer.warmup_steps=8"])
    assert recipe.language == LanguageConfig("opt", prompt="b")
    assert (recipe.output, recipe.vision.name) == ("runs/x", "vit")
    assert (recipe.optimizer.learning_rate, recipe.optimizer.warmup_steps) == ({"*": 5e-6}, 8)
    assert "base" not in yaml.safe_load(dump_config(recipe))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: nowhere.yaml", r"its base .*nowhere\.yaml does not exist: copy that file into the folder"),
        ("base: recipe.yaml", r"recipe .*: its base .*recipe\.yaml is in turn based on this recipe: remove base"),
        ("base: 3", r"base"),
    ],
)
def test_bases_that_cannot_be(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_recipe(path)


def test_a_base_is_not_for_the_command_line(write):
    with pytest.raises(InputError, match="base can only be set inside a recipe file: give the base as RECIPE"):
        load_recipe(write(), ["--base", "x.yaml"])


def test_there_are_shipped_recipes():
    assert {"demo-stage1", "demo-stage2"} <= {path.stem for path in RECIPES}


def test_every_field_has_a_docstring():
    """It is the field's --help; that of a section is the docstring of its class."""
    classes = [node for node in ast.parse(inspect.getsource(config)).body if isinstance(node, ast.ClassDef)]
    assert len(classes) >= 8
    sections = {node.name for node in classes}
    bare = [node.name for node in classes if not ast.get_docstring(node)]
    for node in classes:
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(field, ast.AnnAssign) or sections & set(ast.unparse(field.annotation).split(" | ")):
                continue
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if not (is_text and str(after.value.value).strip()):
                bare.append(f"{node.name}.{field.target.id}")
    assert bare == []


def test_configs_cannot_be_changed(write):
    recipe = load_recipe(write())
    with pytest.raises(AttributeError):
        recipe.output = "elsewhere"
    assert math.isclose(asdict(recipe)["objectives"]["label_smoothing"], 0.1)


def test_a_mixture(write, tmp_path):
    recipe = load_recipe(
        write(data={"train": {"coco:train:/data/coco": None, "s3://b/{0..9}.tar": 3}, "temperature": 2})
    )
    assert recipe.data.sources == {"coco:train:/data/coco": None, "s3://b/{0..9}.tar": 3.0}
    (tmp_path / "again.yaml").write_text(dump_config(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe
    mixed = load_recipe(write(), ["--data.train", '{"a.jsonl": 1, "b.jsonl": null}'])
    assert mixed.data.sources == {"a.jsonl": 1.0, "b.jsonl": None}
    assert load_recipe(write()).data.sources == {"pairs.jsonl": None}


@pytest.mark.parametrize(
    ("train", "why"),
    [({}, "data.train is empty, expected at least one source"), ({"a.jsonl": -1}, "data.train is -1.0, expected at")],
)
def test_a_mixture_that_cannot_be(write, train, why):
    with pytest.raises(InputError, match=why) as error:
        load_recipe(write(data={"train": train}))
    message(error)


# -- numbers of all kinds ------------------------------------------------------------------------------------------

ODD = (
    "-1", "0", "1", "2147483648", "9223372036854775808", "1e308", ".inf", "-.inf", ".nan", '""', "null", "true", '"1"',
    "[]", "{}", "1e-300", "0.5", "-0.5", '"abc"',
)  # fmt: skip


def odd_recipe(draw, folder):
    """A recipe with odd values at one or two of its numbers; what is odd, and the file."""
    chosen = draw(st.lists(st.sampled_from(list(RANGES)), min_size=1, max_size=2, unique=True))
    values = {"stage": "representation", "output": "run", "vision": {"name": "v"}, "data": {"train": "d"}}
    values["evaluation"] = {"task": "retrieval", "data": "d"}
    if any(name.startswith("language") for name in chosen):
        values |= {"stage": "generation", "language": {"name": "l", "lora": {}}}
        values["evaluation"] = {"task": "vqa", "data": "d"}
    odd = {}
    for number, name in enumerate(chosen):
        *sections, key = name.split(".")
        section, place = values, f"@{number}@"
        for each in sections:
            section = section.setdefault(each, {})
        several = {"data.train": {"a": place}, "optimizer.learning_rate": {"*": place}, "optimizer.betas": [0.9, place]}
        section[key] = several.get(name, place)
        odd[name] = draw(st.sampled_from(ODD))
    text = yaml.safe_dump(values)
    for number, value in enumerate(odd.values()):
        text = text.replace(f"'@{number}@'", value)
    (folder / "recipe.yaml").write_text(text)
    return odd, folder / "recipe.yaml"


def test_odd_numbers_are_taken_or_named(tmp_path):
    refused = []

    @settings(max_examples=max(120, settings().max_examples))
    @given(data=st.data())
    def check(data):
        odd, path = odd_recipe(data.draw, tmp_path)
        refused.append(False)
        try:
            recipe = load_recipe(path)
        except InputError as error:
            assert "\n" not in str(error), odd
            refused[-1] = True
            return
        for name in odd:
            *sections, key = name.split(".")
            found = getattr(reduce(getattr, sections, recipe), key)
            found = found.values() if isinstance(found, dict) else found
            for each in found if isinstance(found, Iterable) else [found]:
                assert each is None or each == "frozen" or (type(each) in (int, float) and math.isfinite(each)), odd

    check()
    assert len(refused) >= 100 and len(refused) > sum(refused) > len(refused) / 3


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        (
            "training.max_steps",
            "9223372036854775808",
            "training.max_steps is 9223372036854775808, expected at most 1000000000",
        ),
        ("training.ddp_timeout", "1e12", "training.ddp_timeout"),
        ("training.max_steps", "null", "training.max_steps is None, expected a whole number"),
        ("objectives.itc", ".inf", "objectives.itc is inf, expected a finite number"),
        ("optimizer.weight_decay", ".nan", "optimizer.weight_decay is nan, expected a finite number"),
        ("optimizer.warmup_steps", "-3", "optimizer.warmup_steps is -3, expected at least 0"),
    ],
)
def test_numbers_beyond_sense_are_named(tmp_path, key, value, why):
    (tmp_path / "recipe.yaml").write_text("stage: representation\noutput: run\nvision: {name: v}\ndata: {train: d}\n")
    with pytest.raises(InputError) as raised:
        load_recipe(tmp_path / "recipe.yaml", [f"--{key}={value}"])
    assert why in str(raised.value)
    assert "\n" not in str(raised.value)
