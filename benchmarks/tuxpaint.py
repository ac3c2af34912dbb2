"""Tables of the runs on Tux Paint (docs/results.md): mean and spread over seeds.

    python benchmarks/tuxpaint.py runs/tuxpaint/{0,1,2}

Each folder holds the runs of one seed with their evaluations: ``stage1/itm``, ``stage1/itm+itc``,
``stage2/captioning``, ``tuned/captioning``. What is not there is left out, and n says how many seeds there are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

RECALLS = ("IR@1", "IR@5", "IR@10", "TR@1", "TR@5", "TR@10")
RANKED = {"itc": "by similarity (ITC)", "itm": "re-ranked (ITM)", "itm+itc": "re-ranked (ITM + ITC)"}
CAPTIONS = ("BLEU@1", "BLEU@4", "METEOR", "ROUGE-L", "CIDEr")
WRITTEN = {"stage2": "before fine-tuning", "tuned": "after"}


def read(seeds: list[Path], evaluation: str) -> list[dict[str, Any]]:
    """The metrics of an evaluation of each seed that has it."""
    files = [seed / evaluation / "metrics.json" for seed in seeds]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]


def row(title: str, found: list[dict[str, Any]], names: tuple[str, ...]) -> str:
    """A line of a table; in per cent, and the standard deviation of a sample behind each mean."""
    cells = []
    for name in names:
        values = [100 * each[name] for each in found]
        cells.append(f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else ""))
    return f"| {title} (n = {len(found)}) | {' | '.join(cells)} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", type=Path, nargs="+")
    seeds: list[Path] = parser.parse_args().seeds
    print("| retrieval |", " | ".join(RECALLS), "|")
    for key, title in RANKED.items():
        found = [each[key] for each in read(seeds, f"stage1/{key if key != 'itc' else 'itm'}")]
        if found:
            print(row(title, found, RECALLS))
    print("| captions |", " | ".join(CAPTIONS), "|")
    for folder, title in WRITTEN.items():
        found = read(seeds, f"{folder}/captioning")
        if found:
            print(row(title, found, CAPTIONS))
