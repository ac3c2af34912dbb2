import json
from dataclasses import replace
from pathlib import Path

import pytest

from blip2.corpus import features
from blip2.corpus.features import make_features_with_engine
from blip2.corpus.options import Engine
from blip2.errors import InputError
from blip2.training.features import make_features


def test_what_units_leave_in_the_store_is_found(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "UNIT_SIZE", 7)  # 24 records in four units
    recipe = parts.recipe(tmp_path / "run", data={"train": parts.images, "cached_views": 2, "num_workers": 0})
    make_features_with_engine(Engine(num_threads=1), recipe)
    (line,) = make_features(recipe)
    assert "24 records, 24 images in 2 views, 0 encoded now and 24 found" in line
    apart = replace(recipe, output=str(tmp_path / "other" / "run"))
    assert "24 encoded now" in make_features(apart)[0]
    assert rows(tmp_path) == rows(tmp_path / "other")


def rows(folder: Path) -> dict[str, bytes]:
    """What a store holds of each image."""
    found = {}
    for index in folder.glob("features/*/*.index.jsonl"):
        lines = [json.loads(line) for line in index.read_text().splitlines()]
        places = {line["image"]: line["row"] for line in lines if "row" in line}
        data = index.with_name(index.name.replace(".index.jsonl", ".bin")).read_bytes()
        size = len(data) // len(places)
        found |= {image: data[row * size : (row + 1) * size] for image, row in places.items()}
    assert len(found) == 24
    return found


def test_a_stream_has_no_cached_features(parts, tmp_path, shards):
    recipe = parts.recipe(tmp_path / "run", data={"train": str(shards / "*.tar"), "num_workers": 0})
    with pytest.raises(InputError, match="need a table or a folder, but the data is read as a stream"):
        make_features_with_engine(Engine(), recipe)
