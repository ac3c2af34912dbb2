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


def rows(folder: Path) -> bytes:
    """What a store holds, part by part in the order in which they were made."""
    files = sorted(folder.glob("features/*/*.bin"), key=lambda path: path.stat().st_mtime_ns)
    return b"".join(path.read_bytes() for path in files)


def test_a_stream_has_no_cached_features(parts, tmp_path, shards):
    recipe = parts.recipe(tmp_path / "run", data={"train": str(shards / "*.tar"), "num_workers": 0})
    with pytest.raises(InputError, match="need a table or a folder, but the data is read as a stream"):
        make_features_with_engine(Engine(), recipe)
