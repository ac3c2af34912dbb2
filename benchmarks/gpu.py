"""python benchmarks/gpu.py [PART ...]

What this project does on an NVIDIA GPU, in one command and without a network: that its results are right there, and how
fast they come, compared with LAVIS and transformers. Parts that are done are not done again; --again does them all.
Results are printed as they come; each part writes a file into the folder of --output, and gpu.json there holds all of
them.

    python benchmarks/gpu.py                    all parts, in a few minutes
    python benchmarks/gpu.py losses stage1      these
    python benchmarks/gpu.py --rehearse         all parts at tiny sizes on the CPU, to find typing errors
    python benchmarks/gpu.py --tables           the tables of docs/performance.md, from gpu.json
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CHECKS = ("losses", "settings", "resume", "tokens", "features", "quantization", "processes", "memory")
SPEED = ("rates", "stage1", "encode", "stage2-opt", "stage2-t5")
TOGETHER = (("losses",), ("settings",), ("resume",), ("tokens", "features"), ("quantization", "processes"), ("memory",))
"""Parts that check, by the process that does them: these run side by side, and parts that time do not."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join((*CHECKS, *SPEED))}")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu", help="folder of the results")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--again", action="store_true", help="do parts that are done as well")
    parser.add_argument("--tables", action="store_true", help="print tables of what is in gpu.json, and do nothing")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in this process
    options = parser.parse_args()
    unknown = set(options.parts) - {*CHECKS, *SPEED}
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}: choose from {', '.join((*CHECKS, *SPEED))}")
    output = options.output / "rehearsal" if options.rehearse else options.output
    output.mkdir(parents=True, exist_ok=True)
    wanted = options.parts or [*CHECKS, *SPEED]
    if options.here:
        return work(wanted, output, options.rehearse)
    if options.tables:
        import gpu_tables

        print(gpu_tables.tables(json.loads((output / "gpu.json").read_text())))
        return 0
    if not options.again:
        wanted = [part for part in wanted if not is_done(output / f"{part}.json")]
    environment = {**os.environ, **found_packages(), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    shared = [str(option) for option in ("--here", "--output", options.output)] + ["--rehearse"] * options.rehearse
    command = [sys.executable, "-W", "ignore", str(HERE / "gpu.py"), *shared]
    groups = [[part for part in group if part in wanted] for group in TOGETHER]
    if options.rehearse:  # two cores: one after the other, in one process
        groups = [[part for group in groups for part in group]]
    groups = [group for group in groups if group]
    cores = {} if options.rehearse else {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // max(len(groups), 1), 1))}
    side_by_side = [subprocess.Popen([*command, *group], env=environment | cores) for group in groups]
    codes = [process.wait() for process in side_by_side]
    failed = any(codes)
    timing = [part for part in wanted if part in SPEED]
    # Each in a process of its own: the memory of the card is its own then.
    for parts in [timing] if options.rehearse else [[part] for part in timing]:
        if parts:
            failed |= bool(subprocess.run([*command, *parts], env=environment).returncode)
    together = {part: json.loads((output / f"{part}.json").read_text()) for part in (*CHECKS, *SPEED)
                if (output / f"{part}.json").exists()}  # fmt: skip
    (output / "gpu.json").write_text(json.dumps(together, indent=1) + "\n")
    of = len(CHECKS) + len(SPEED)
    print(f"{output / 'gpu.json'} holds {len(together)} of {of} parts; {'some failed' if failed else 'all is well'}")
    return int(failed)


def is_done(file: Path) -> bool:
    return file.exists() and json.loads(file.read_text())["ok"]


def found_packages() -> dict[str, str]:
    """The environment in which the packages that `gpu_pack.py` put into .gpu are found, if there are any."""
    paths = [str(HERE), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    wheels = ROOT / ".gpu"
    if wheels.is_dir() and find_spec("datasets") is None:
        import peers

        paths.insert(0, str(peers.unpack(wheels, wheels / "site")))
    return {"PYTHONPATH": os.pathsep.join(paths)}


def work(parts: list[str], output: Path, tiny: bool) -> int:
    """Do parts in this process, one after the other; a part that fails does not stop those behind it."""
    import torch
    from gpu_checks import CHECKS, Place, Row, clean_up
    from gpu_speed import SPEED

    logging.disable(logging.WARNING)
    device = torch.device("cpu" if tiny else "cuda")
    if tiny:  # its own compiler takes minutes on a CPU
        torch.compile = partial(torch.compile, backend="aot_eager")
    failed = False
    for part in parts:
        started, rows, error = time.monotonic(), [], None
        with tempfile.TemporaryDirectory() as folder:
            place = Place(device, tiny, Path(folder))
            try:
                for found in {**CHECKS, **SPEED}[part](place):
                    row = {**found._asdict(), "ok": found.holds} if isinstance(found, Row) else found
                    rows.append(row)
                    print(f"{part:12} {line(row)}", flush=True)
            except Exception:
                error = traceback.format_exc()
                print(f"{part:12} FAILED\n{error}", flush=True)
        clean_up(place)
        ok = error is None and all(row.get("ok", True) for row in rows)
        failed |= not ok
        seconds = time.monotonic() - started
        about = {"ok": ok, "seconds": seconds, "error": error, "machine": machine(device), "rows": rows}
        (output / f"{part}.json").write_text(json.dumps(about, indent=1) + "\n")
        print(f"{part:12} {'done' if ok else 'NOT RIGHT'} after {seconds:.0f} s", flush=True)
    return int(failed)


def line(row: dict[str, Any]) -> str:
    """A result in a line."""
    if "limit" in row:
        limit = "" if row["limit"] is None else f" (at most {row['limit']:g}){'' if row['ok'] else '  <-- WRONG'}"
        value = row["value"] if isinstance(row["value"], str) else f"{row['value']:.3g}"
        return f"{row['name']}: {value}{limit}"
    hidden = {"values", "kernels", "name"}
    shown = {
        key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items() if key not in hidden
    }
    return f"{row['name']}: " + ", ".join(f"{key} {value}" for key, value in shown.items())


def machine(device: Any) -> dict[str, Any]:
    import torch
    import transformers

    return {
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
        "cores": os.cpu_count(),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
