"""python benchmarks/run.py [ROW ...] [--rounds 3]

This project and its peers at the same work, in one run: prints the table of docs/performance.md, row by row, and adds
the rows to benchmarks/results.json, with the machine and the versions. Without a name all rows are run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import compare
import peers
import stage1
import stage2
import torch
from compare import GIB, Result

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
PYTHON = sys.executable
LOOSE = 5e-5
"""Values of both sides may differ by so much in fp32: losses of about 10, logits of about 1."""
Row = Callable[[int, Path], dict[str, dict[str, Any]]]


def measured(ours: Result, peer: Result, tolerance: float | None) -> dict[str, Any]:
    """A row of the table.

    Args:
        tolerance: largest difference between the values of both; None: they are not the same by intent.
    """
    difference = compare.largest_difference(ours, peer)
    if tolerance is not None and not difference <= tolerance:  # NaN neither
        raise SystemExit(f"the results differ by {difference}, which is more than {tolerance}: this is no comparison")
    median, low, high = compare.ratios(ours, peer)
    return {
        "ours": ours.median, "peer": peer.median, "ratio": median, "lowest": low, "highest": high,
        "ours_gib": ours.peak / GIB, "peer_gib": peer.peak / GIB, "difference": difference,
    }  # fmt: skip


# -- stage 1, compared with LAVIS --------------------------------------------------------------------------------------


def stage1_step(peer: stage1.Case, tolerance: float | None = None, **ours: stage1.Case) -> Row:
    """LAVIS at one case, and this project at several that are the same work."""

    def run(rounds: int, folder: Path) -> dict[str, dict[str, Any]]:
        sides: list[tuple[str, list[str | Path]]] = []
        for name, case in {**ours, "LAVIS": peer}.items():
            (folder / name).mkdir()
            stage1.prepare(case, folder / name)
            command = dict(peers.stage1_sides("step", folder / name))["LAVIS" if name == "LAVIS" else "blip2"]
            sides.append((name, command))
        found = compare.run_in_turns(sides, rounds)
        return {
            name: measured(found[name], found["LAVIS"], None if case.bf16 else tolerance) for name, case in ours.items()
        }

    return run


def reranking(rounds: int, folder: Path) -> dict[str, dict[str, Any]]:
    stage1.prepare(stage1.Case(), folder, texts=128)
    both = compare.run_in_turns(peers.stage1_sides("rerank", folder), rounds)
    return {"": measured(both["blip2"], both["LAVIS"], LOOSE)}


# -- compared with transformers ----------------------------------------------------------------------------------------


def versus_transformers(work: str, language: str, texts: tuple[int, int] = (9, 14)) -> Row:
    def run(rounds: int, folder: Path) -> dict[str, dict[str, Any]]:
        stage2.prepare(work, language, folder, texts=texts)
        theirs = "step" if work == "cached" else work
        script = HERE / "stage2.py"
        sides = [
            ("blip2", [PYTHON, script, work, "blip2", folder]),
            ("transformers", [PYTHON, script, theirs, "transformers", folder]),
        ]
        both = compare.run_in_turns(sides, rounds)
        return {"": measured(both["blip2"], both["transformers"], LOOSE)}

    return run


# -- compared with itself ----------------------------------------------------------------------------------------------


def script(name: str) -> Row:
    """A row that a script of its own measures; it prints its result as JSON in its last line."""

    def run(rounds: int, folder: Path) -> dict[str, dict[str, Any]]:
        command = [PYTHON, str(HERE / f"{name}.py"), str(folder), str(rounds)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return {"": json.loads(done.stdout.splitlines()[-1])}

    return run


CASE = stage1.Case()
TRAINING = replace(CASE, dropout=0.1)
LONG = replace(CASE, shortest=28, longest=32)
WEB = replace(CASE, shortest=5, longest=32)
ROWS: dict[str, tuple[str, str, Row]] = {
    "stage1": (
        "stage-1 step, captions of 9 to 14 tokens, dropout off", "LAVIS",
        stage1_step(CASE, LOOSE, fp32=CASE, bf16=replace(CASE, bf16=True)),
    ),
    "stage1-dropout": (
        "stage-1 step, captions of 9 to 14 tokens, dropout 0.1", "LAVIS",
        stage1_step(TRAINING, fp32=TRAINING, bf16=replace(TRAINING, bf16=True)),
    ),
    "stage1-checkpointing": (
        "stage-1 step, dropout 0.1, activation checkpointing", "LAVIS without",
        stage1_step(TRAINING, fp32=replace(TRAINING, checkpointing=True)),
    ),
    "stage1-long": (
        "stage-1 step, captions of 28 to 32 tokens, dropout off", "LAVIS", stage1_step(LONG, LOOSE, fp32=LONG)
    ),
    "stage1-web": (
        "stage-1 step, captions of 5 to 32 tokens, dropout off", "LAVIS", stage1_step(WEB, LOOSE, fp32=WEB)
    ),
    "rerank": ("re-ranking, 16 images x 128 captions", "LAVIS", reranking),
    "matching": ("ITM scores of 8 images x 8 texts", "transformers", versus_transformers("matching", "opt")),
    "answers-smollm2": (
        "8 answers, SmolLM2-135M's shape: 32 + 12 tokens read, 5 beams, 5 written", "transformers",
        versus_transformers("answers", "llama", (12, 12)),
    ),
    "answers-opt": (
        "8 answers, OPT-125M's shape", "transformers", versus_transformers("answers", "opt", (12, 12))
    ),
    "answers-opt-pixels": (
        "8 answers, OPT-125M's shape, ViT-S and Q-Former included", "transformers",
        versus_transformers("answers-from-pixels", "opt", (12, 12)),
    ),
    "stage2": ("stage-2 step, ViT-S, OPT-125M's shape", "transformers", versus_transformers("step", "opt")),
    "stage2-cached": (
        "the same with cached features", "transformers without", versus_transformers("cached", "opt")
    ),
    "epoch": ("second epoch of tuxpaint-stage1, cached features", "blip2 without", script("epoch")),
    "loader": ("images a core decodes and augments", "those ViT-L encodes on all cores", script("loader")),
    "memory": ("memory of training on a stream after 10,000 steps", "after 100", script("memory")),
}  # fmt: skip


def machine() -> dict[str, Any]:
    names = ("torch", "transformers", "accelerate", "numpy")
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())  # fmt: skip
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **{name: importlib.metadata.version(name) for name in names},
    }


def line(title: str, peer: str, row: dict[str, Any]) -> str:
    """A line of the table."""
    memory = f"{row['ours_gib']:.1f} / {row['peer_gib']:.1f} GiB" if "ours_gib" in row else ""
    ratio = f"**{row['ratio']:.2f}** ({row['lowest']:.2f} to {row['highest']:.2f})"
    return f"| {title} | {peer} | {row['ours']:.3g} / {row['peer']:.3g} {row.get('of', 's')} | {ratio} | {memory} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"any of {', '.join(ROWS)}")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: 3)")
    options = parser.parse_args()
    unknown = set(options.rows) - set(ROWS)
    if unknown:
        parser.error(f"there is no row {', '.join(sorted(unknown))}: choose from {', '.join(ROWS)}")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    print("| work | compared with | blip2 / peer | ratio (lowest to highest) | peak memory |\n|---|---|---:|---:|---:|")
    for name in options.rows or ROWS:
        title, peer, run = ROWS[name]
        with tempfile.TemporaryDirectory() as folder:
            rows = run(options.rounds, Path(folder))
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        for kind, row in rows.items():
            print(line(f"{title}, {kind}" if kind else title, peer, row), flush=True)
            key = f"{name}-{kind}" if kind else name
            results[key] = {"title": title, "beside": peer, **row, "rounds": options.rounds, "machine": machine()}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
