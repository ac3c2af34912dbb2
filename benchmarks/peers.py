"""LAVIS as a contender: the environment and the package that it needs, made once in .venv-lavis."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
HOME = ROOT / ".venv-lavis"
LAVIS = "salesforce-lavis==1.0.2"


def lavis() -> tuple[Path, Path]:
    """(python of the environment, folder of the unpacked package)."""
    python, package = HOME / "bin" / "python", HOME / "package"
    if not (package / "lavis").is_dir():
        subprocess.run([sys.executable, "-m", "venv", HOME], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "-c", ROOT / "constraints.txt", "torch"], check=True)
        subprocess.run([*install, "transformers==4.33.2", "numpy"], check=True)
        download = [python, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", HOME, LAVIS]
        subprocess.run(download, check=True)
        with zipfile.ZipFile(next(HOME.glob("*.whl"))) as wheel:
            wheel.extractall(package)
    return python, package


def stage1_sides(work: str, folder: Path) -> list[tuple[str, list[str | Path]]]:
    """The contenders of stage 1, both with the inputs of `folder`: blip2 and LAVIS."""
    python, _ = lavis()
    return [
        ("blip2", [sys.executable, HERE / "stage1.py", work, folder]),
        ("LAVIS", [python, HERE / "lavis_peer.py", work, folder]),
    ]
