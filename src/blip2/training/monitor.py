"""What the processes of a run say of themselves after each step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

import torch

from blip2.distributed import gather


class Watch:
    """How long a process waited for data, and how busy its GPU is, put together over all processes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tells_utilization = device.type == "cuda"
        self.waited = 0.0
        """Seconds that this process has waited for data since the last :meth:`look`."""

    def look(self, asked: bool, seconds: float) -> tuple[dict[str, float], bool]:
        """What is seen of a step, and whether any process was asked to stop. All processes call this together.

        Args:
            asked: whether this process was.
            seconds: the step took.

        Returns:
            ``data_seconds`` and ``data_share`` (of the step) of the process that waited longest for data; on GPUs also
            ``gpu_memory_gib``, the most that was ever allocated on one, and ``gpu_utilization``, the mean in per cent,
            where pynvml is installed.
        """
        own = [float(asked), self.waited, *self._gpu()]
        self.waited = 0.0
        every = gather(torch.tensor([own], device=self._device))  # [processes, 4]
        most = every.amax(dim=0).tolist()
        seen = {"data_seconds": most[1], "data_share": most[1] / seconds}
        if self._device.type == "cuda":
            seen["gpu_memory_gib"] = most[2]
            if float(every[:, 3].min()) >= 0:
                seen["gpu_utilization"] = float(every[:, 3].mean())
        return seen, bool(most[0])

    def _gpu(self) -> tuple[float, float]:
        """GiB at the peak, and per cent of the time in which something ran; -1 where that cannot be told."""
        if self._device.type != "cuda":
            return 0.0, -1.0
        memory = torch.cuda.max_memory_allocated(self._device) / 2**30
        if self._tells_utilization:
            try:
                return memory, float(torch.cuda.utilization(self._device))
            except Exception:  # no pynvml, or one that does not go with the driver: nothing to stop training for
                self._tells_utilization = False
        return memory, -1.0


class FrozenFiles:
    """The files of the frozen parts, which are mapped: what is written into one of them changes a run under way.

    Args:
        names: files, and folders of weights; names on a hub are left out.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._paths = [
            file
            for path in map(Path, names)
            for file in ([path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else [])
            if file.suffix in (".safetensors", ".bin", ".pth", ".pt")
        ]
        self._found = self._look()

    def _look(self) -> dict[tuple[Path, int], tuple[int, int]]:
        found: dict[tuple[Path, int], tuple[int, int]] = {}
        for path in self._paths:
            with contextlib.suppress(OSError):
                about = path.stat()
                found[path, about.st_ino] = (about.st_size, about.st_mtime_ns)
        return found

    def changed(self) -> list[str]:
        """Those whose size or time is another than at the start. One that was deleted, or replaced by another under its
        name, is not among them: it stays mapped as it was."""
        now = self._look()
        return [str(file[0]) for file, was in self._found.items() if now.get(file, was) != was]
