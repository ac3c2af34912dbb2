"""What a release holds: a wheel and an sdist, built from this folder without a network."""

import tarfile
import zipfile
from configparser import ConfigParser
from email.parser import BytesParser
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

import blip2

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """An unpacked sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    (path,) = SdistBuilder(str(ROOT)).build(directory=str(folder))
    with tarfile.open(path) as tar:
        tar.extractall(folder, filter="data")
    return folder / f"blip2-{blip2.__version__}"


def build_wheel(root, folder):
    (path,) = WheelBuilder(str(root)).build(directory=str(folder), versions=["standard"])
    return Path(path)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


def test_a_wheel_has_the_package_and_the_recipes_and_nothing_else(wheel):
    source = ROOT / "src"
    package = {path.relative_to(source).as_posix() for path in source.rglob("*.py")} | {"blip2/py.typed"}
    package |= {path.relative_to(source).as_posix() for path in (source / "blip2/serve/static").iterdir()}
    recipes = {f"blip2/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    info = f"blip2-{blip2.__version__}.dist-info"
    found = set(zipfile.ZipFile(wheel).namelist())
    assert len(recipes) > 20 and {"blip2/model/qformer.py", "blip2/serve/static/index.html"} <= package
    assert {name for name in found if not name.startswith(info)} == package | recipes
    names = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    assert {name for name in found if name.startswith(info)} == {f"{info}/{name}" for name in names}


def test_an_sdist_has_what_its_tests_read_and_builds_the_same_wheel(sdist, wheel, tmp_path):
    found = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    assert {name.split("/")[0] for name in found} == {
        *("src", "tests", "recipes", "docs", "examples", "benchmarks"),
        *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"),
        *("pyproject.toml", "constraints.txt", "Makefile", "mkdocs.yml", "PKG-INFO", ".gitignore"),
    }
    assert not [name for name in found if "__pycache__" in name or name.endswith((".pyc", ".safetensors", ".pt"))]
    assert build_wheel(sdist, tmp_path).read_bytes() == wheel.read_bytes()


def test_the_metadata_names_the_version_the_command_and_every_requirement(wheel):
    with zipfile.ZipFile(wheel) as files:
        info = f"blip2-{blip2.__version__}.dist-info"
        metadata = BytesParser().parsebytes(files.read(f"{info}/METADATA"))
        commands = files.read(f"{info}/entry_points.txt").decode()
    assert (metadata["Name"], metadata["Version"]) == ("blip2", blip2.__version__)
    assert metadata["Requires-Python"] == ">=3.11" and metadata["License-Expression"] == "Apache-2.0"
    required = {line.split(">=")[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert {"torch", "transformers", "datasets", "safetensors"} <= required and "pytest" not in required
    entry_points = ConfigParser()
    entry_points.read_string(commands)
    assert {name: dict(entry_points[name]) for name in entry_points.sections()} == {
        "console_scripts": {"blip2": "blip2.__main__:main"},
        "lmms_eval.models": {"blip2": "blip2.evaluation.lmms_eval:MANIFEST"},
    }
