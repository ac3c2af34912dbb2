"""Monitoring of a run: system metrics of all processes after each step, and changes to the files in use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

import torch

from blip2.distributed import all_gather


class SystemMonitor:
    """Per-step system metrics over all processes: waiting time for data, GPU memory and GPU utilization."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._has_utilization = device.type == "cuda"
        self.data_seconds = 0.0
        """Seconds that this process has waited for data since the last :meth:`collect`."""

    def collect(self, received_signal: bool, seconds: float) -> tuple[dict[str, float], bool]:
        """Gather the metrics of a step from all processes. All processes must call it.

        Args:
            received_signal: whether this process was asked to stop.
            seconds: duration of the step.

        Returns:
            The metrics, and whether any process was asked to stop. ``data_seconds`` is the time for which the slowest
            process waited for data, and ``data_share`` is that time as a fraction of the step. On GPUs there are also
            ``gpu_memory_gib``, the largest peak memory of a GPU, and ``gpu_utilization``, the mean in percent, if
            pynvml is installed.
        """
        local = [float(received_signal), self.data_seconds, *self._gpu_metrics()]
        self.data_seconds = 0.0
        gathered = all_gather(torch.tensor([local], device=self._device))  # [world_size, 4]
        maxima = gathered.amax(dim=0).tolist()
        metrics = {"data_seconds": maxima[1], "data_share": maxima[1] / seconds}
        if self._device.type == "cuda":
            metrics["gpu_memory_gib"] = maxima[2]
            if float(gathered[:, 3].min()) >= 0:
                metrics["gpu_utilization"] = float(gathered[:, 3].mean())
        return metrics, bool(maxima[0])

    def _gpu_metrics(self) -> tuple[float, float]:
        """Return the peak memory in GiB and the utilization in percent, which is -1 if it is unknown."""
        if self._device.type != "cuda":
            return 0.0, -1.0
        memory = torch.cuda.max_memory_allocated(self._device) / 2**30
        if self._has_utilization:
            try:
                return memory, float(torch.cuda.utilization(self._device))
            except Exception:  # pynvml is missing or does not match the driver: training goes on without it
                self._has_utilization = False
        return memory, -1.0


class FrozenFiles:
    """Watches the weight files of the frozen parts for changes.

    These files are memory-mapped, so a change of their content also changes the model of a running process.

    Args:
        names: paths of weight files or of folders with weight files; names on a hub are ignored.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._paths = [
            file
            for path in map(Path, names)
            for file in ([path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else [])
            if file.suffix in (".safetensors", ".bin", ".pth", ".pt")
        ]
        self._initial = self._stat()

    def _stat(self) -> dict[tuple[Path, int], tuple[int, int]]:
        stats: dict[tuple[Path, int], tuple[int, int]] = {}
        for path in self._paths:
            with contextlib.suppress(OSError):
                stat = path.stat()
                stats[path, stat.st_ino] = (stat.st_size, stat.st_mtime_ns)
        return stats

    def changed_files(self) -> list[str]:
        """Return the files whose size or modification time has changed since the start.

        A file that was deleted or replaced is not returned, because the process still maps the original file.
        """
        current = self._stat()
        return [str(file[0]) for file, stat in self._initial.items() if current.get(file, stat) != stat]
