"""LAVIS as a runner: what its stage 1 needs, unpacked once into the ignored folder .lavis.

Of the package `salesforce-lavis` three files are used, and they need transformers 4.33.2, which goes into a folder that
only the runner's process looks into. Nothing of it is installed.
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
    """The folder that holds the packages, to be put before all others on the path of the runner."""
    packed = ROOT / ".gpu" / "lavis"  # what gpu_pack.py took along
    wheels = packed if packed.is_dir() else HOME / "wheels"
    site = HOME / "site"
    if not (site.is_dir() or wheels.is_dir()):
        download(wheels)
    return unpack(wheels, site)


def unpack(wheels: Path, site: Path) -> Path:
    """Put the contents of wheels where Python can find them, once; of LAVIS :data:`FILES` alone.

    Returns:
        `site`, the folder for PYTHONPATH.
    """
    if not site.is_dir():
        partial = site.with_name("partial")
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(partial, FILES if "lavis" in wheel.name else None)
        partial.rename(site)
    return site


def download(wheels: Path) -> None:
    """The wheels of :data:`PACKAGES`; they are pure Python, so that any machine can use them."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--dest", wheels, *PACKAGES], check=True)


def stage1_sides(work: str, folder: Path) -> list[tuple[str, list[str | Path]]]:
    """The runners of stage 1, both with the inputs of `folder`: blip2 and LAVIS."""
    return [
        ("blip2", [sys.executable, HERE / "stage1.py", work, folder]),
        ("LAVIS", [sys.executable, HERE / "lavis_peer.py", work, folder]),
    ]
