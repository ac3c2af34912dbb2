"""python benchmarks/gpu_pack.py

Fills the ignored folder .gpu with what a machine with PyTorch for CUDA but without a network may lack, so that
`make gpu` runs there from a copy of this folder: wheels of this project's needs and of LAVIS, about 30 MB.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import peers

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".gpu"
NEEDED = (
    "transformers", "datasets", "dill", "multiprocess", "jsonargparse", "docstring_parser", "typeshed_client",
    "bitsandbytes",
)  # fmt: skip
"""Beside torch, torchvision, accelerate, numpy, pandas, pyarrow, pillow, rich, safetensors and tokenizers."""
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")
LIBRARY = re.compile(r"libbitsandbytes_(?!cpu|cuda13)")
"""Of bitsandbytes, which brings a library for each version of CUDA and for other makers: what is left out."""


def main() -> None:
    HOME.mkdir(exist_ok=True)
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                   "--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", "--dest", folder,
                   *(part for platform in PLATFORMS for part in ("--platform", platform))]  # fmt: skip
        for package in NEEDED:
            subprocess.run([*command, f"{package}=={pinned[package]}"], check=True)
        for wheel in folder.glob("*.whl"):
            copy(wheel, HOME / wheel.name)
    peers.download(HOME / "lavis")
    size = sum(file.stat().st_size for file in HOME.rglob("*.whl"))
    print(f"{HOME} holds {size / 2**20:.0f} MiB")


def copy(wheel: Path, target: Path) -> None:
    """A wheel without the libraries that nobody needs there."""
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as kept:
        for item in source.infolist():
            if not LIBRARY.search(item.filename):
                kept.writestr(item, source.read(item))


if __name__ == "__main__":
    main()
