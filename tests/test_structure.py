"""The rules of the source that no other tool checks."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "blip2"
FILES = {path.relative_to(SOURCE).as_posix(): path for path in sorted(SOURCE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}

LAYERS = (
    {"errors", "memory"},
    {"config", "io", "distributed", "console"},
    {"recipe", "decoding", "options"},
    {"backbones", "model"},  # but for each other they are one layer: the models are made of the encoder and the LLM
    {"data"},
    {"feature_cache", "interop"},
    {"builder"},
    {"checkpoint"},
    {"training", "pipelines", "resumable", "hub", "convert"},
    {"evaluation"},
    {"corpus"},
    {"search"},
    {"serve"},
    {"demo"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
"""A module imports from its own layer and from those before it."""
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}


def imports(name):
    """(module, name or None) of everything of this package that a file imports, wherever in it."""
    found = []
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            if (node.module or "").split(".")[0] == "blip2":
                found += [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names if alias.name.split(".")[0] == "blip2"]
    return found


def rooms(name):
    """The first parts below blip2 of what a file imports: ``model``, ``config`` ..."""
    found = {".".join(filter(None, (module, what))).split(".")[1] for module, what in imports(name) if what or module}
    return found - {"__version__"}


@pytest.mark.parametrize("name", FILES)
def test_imports_point_one_way(name):
    room = name.split("/")[0].removesuffix(".py")
    if room != "__init__":
        assert {other for other in rooms(name) if LAYER[other] > LAYER[room]} == set()


def test_what_uses_a_model_does_not_import_training():
    users = {
        "pipelines/loading.py",
        "pipelines/base.py",
        "pipelines/generation.py",
        "pipelines/chat.py",
        "checkpoint.py",
        "builder.py",
        "convert.py",
        "resumable.py",
    }
    assert users <= set(FILES) and [name for name in users if "training" in rooms(name)] == []


@pytest.mark.parametrize("name", FILES)
def test_nobody_reaches_into_another_s_underscore_names(name):
    assert [
        what for _, what in imports(name) if what is not None and what.startswith("_") and what != "__version__"
    ] == []
    # Nor by attribute: of another of our modules, however it was imported.
    ours = {what or module.split(".")[0] for module, what in imports(name)}
    reached = [
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in ours
        and node.attr.startswith("_")
        and not node.attr.endswith("__")
    ]
    assert reached == []


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_unpickled(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {part.split(".")[0] for part in names} & {"pickle", "dill", "cloudpickle", "shelve", "joblib"}
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "numpy.load", "np.load"):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            safe = options.get("weights_only") == "True" or "np" in ast.unparse(node.func)
            assert safe and options.get("allow_pickle") in (None, "False"), ast.unparse(node)


def test_there_is_something_to_check():
    assert {"model/qformer.py", "training/trainer.py", "cli.py"} <= set(FILES)
    assert "model" in rooms("builder.py") and "checkpoint" in rooms("pipelines/loading.py")
    assert "config" in rooms("model/qformer.py")
