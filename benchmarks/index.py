"""python benchmarks/index.py FOLDER [ENTRIES]

How long a loader over an index of 1 000 000 entries takes to start, and whether its memory stays flat: batches are
planned from the start, then into the next epoch, and the memory that belongs to this process alone is looked at on the
way.
The first start converts the index once; the second finds it converted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

BATCH, STEPS, LOOKS = 64, 1500, 6


def write(path: Path, entries: int) -> None:
    with path.open("w") as file:
        for number in range(entries):
            file.write(f'{{"image": "{number:08d}.jpg", "caption": "caption number {number} of all"}}\n')


def memory() -> float:
    """MB of this process that are not mapped from files."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows["RssAnon"].split()[0]) / 1024


def measure(source: str, entries: int) -> None:
    """Print seconds to the first plan, and MB before and on the way."""
    from blip2.config import DataConfig
    from blip2.data.mixtures import build_mixture, sample_mixture
    from blip2.data.positions import START, MixturePosition, SourcePosition
    from blip2.data.sources import open_records

    before, started = memory(), time.perf_counter()
    records = open_records(source, DataConfig(train=source))
    sources = build_mixture({source: None}, [records])
    plans = sample_mixture(sources, BATCH, 0)
    next(plans)
    seconds, megabytes = time.perf_counter() - started, [memory()]
    consumed = (entries // BATCH - STEPS // 2) * BATCH  # the next epoch starts halfway
    late: SourcePosition = {**START, "consumed": consumed}
    middle: MixturePosition = {"num_batches": 0, "gradient_accumulation_steps": 1, "sources": {source: late}}
    for some in (plans, sample_mixture(sources, BATCH, 0, position=middle)):
        for number in range(1, STEPS + 1):
            next(some)
            if number % (STEPS // LOOKS) == 0:
                megabytes.append(memory())
    print(json.dumps({"seconds to the first batch": seconds, "MB before": before, "MB": megabytes}), flush=True)


def main() -> None:
    folder, entries = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000
    if len(sys.argv) > 3:
        measure(str(folder / "index.jsonl"), entries)
        return
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "index.jsonl", entries)
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    for start in ("first", "second"):
        command = [sys.executable, __file__, str(folder), str(entries), "measure"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        print(json.dumps({"start": start, **json.loads(done.stdout.splitlines()[-1])}))


if __name__ == "__main__":
    main()
