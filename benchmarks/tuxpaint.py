"""Tables of the runs on Tux Paint (docs/results.md): mean and spread over seeds.

    python benchmarks/tuxpaint.py runs/tuxpaint/{0,1,2}

Each folder holds the runs of one seed with their evaluations: ``stage1/itm``, ``stage1/itm+itc``, and
``captioning`` in ``stage2``, in ``alone``, which is stage 2 without stage 1, and in ``tuned``. What is not there is
left out, and n says how many seeds there are.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from claims.common import mean_spread

from blip2.data.assets import fetch
from blip2.evaluation.captioning import score_captions
from blip2.evaluation.scenes import read_rows
from blip2.training.metrics import read_metrics

RECALLS = ("IR@1", "IR@5", "IR@10", "TR@1", "TR@5", "TR@10")
RANKED = {"itc": "by similarity (ITC)", "itm": "re-ranked (ITM)", "itm+itc": "re-ranked (ITM + ITC)"}
CAPTIONS = ("content F1", "BLEU@1", "METEOR", "ROUGE-L", "CIDEr")
WRITTEN = {"alone": "stage 2 without stage 1", "stage2": "stages 1 and 2", "tuned": "then fine-tuned"}


def read(seeds: list[Path], evaluation: str) -> list[dict[str, Any]]:
    """The metrics of an evaluation of each seed that has it."""
    files = [seed / evaluation / "metrics.json" for seed in seeds]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]


def read_captions(seeds: list[Path], run: str) -> list[dict[str, Any]]:
    """The metrics of the captions of each seed that has them, with the held-out loss and content F1."""
    references = [row["caption"] for row in read_rows(fetch("tuxpaint-stamps") / "held_out.jsonl")]
    found = []
    for seed in seeds:
        for metrics in read([seed], f"{run}/captioning"):
            rows = json.loads((seed / run / "captioning" / "predictions.json").read_text(encoding="utf-8"))
            f1 = score_captions([each["caption"] for each in rows], references)["content_f1"]
            losses = [each["validation_lm"] for each in read_metrics(seed / run) if "validation_lm" in each]
            found.append({**metrics, "content F1": f1, "loss": losses[-1] if losses else math.nan})
    return found


def row(title: str, found: list[dict[str, Any]], names: tuple[str, ...], loss: str = "") -> str:
    """A line of a table, in per cent."""
    cells = [loss] * bool(loss) + [mean_spread([each[name] for each in found]) for name in names]
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
    print("| captions | held-out loss |", " | ".join(CAPTIONS), "|")
    for run, title in WRITTEN.items():
        found = read_captions(seeds, run)
        if found:
            print(row(title, found, CAPTIONS, mean_spread([each["loss"] for each in found], 1, 2)))
