"""LAVIS as a contender: what its stage 1 needs, unpacked once into the ignored folder .lavis.

Of the package `salesforce-lavis` three files are used, and they need transformers 4.33.2, which goes into a folder that
only the contender's process looks into. Nothing of it is installed.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
HOME = ROOT / ".lavis"
PACKAGES = ("salesforce-lavis==1.0.2", "transformers==4.33.2", "huggingface_hub==0.24.7")
FILES = (
    "lavis/models/blip2_models/Qformer.py", "lavis/models/blip2_models/blip2_qformer.py",
    "lavis/models/blip_models/blip_outputs.py",
)  # fmt: skip


def lavis() -> Path:
    """The folder that holds the packages, to be put before all others on the path of the contender."""
    site = HOME / "site"
    if not site.is_dir():
        packed = ROOT / ".gpu" / "lavis"  # what gpu_pack.py took along
        wheels = packed if packed.is_dir() else HOME / "wheels"
        if not wheels.is_dir():
            download(wheels)
        partial = HOME / "partial"
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                whole = "lavis" not in wheel.name
                archive.extractall(partial, None if whole else FILES)
        partial.rename(site)
    return site


def download(wheels: Path) -> None:
    """The wheels of :data:`PACKAGES`; they are pure Python, so that any machine can use them."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--dest", wheels, *PACKAGES], check=True)


def stage1_sides(work: str, folder: Path) -> list[tuple[str, list[str | Path]]]:
    """The contenders of stage 1, both with the inputs of `folder`: blip2 and LAVIS."""
    return [
        ("blip2", [sys.executable, HERE / "stage1.py", work, folder]),
        ("LAVIS", [sys.executable, HERE / "lavis_peer.py", work, folder]),
    ]
