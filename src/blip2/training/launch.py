"""The processes of a run: accelerate's setup, the lock of the run's folder, and the log of failures."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs

from blip2.builder import choose_device
from blip2.config import Recipe
from blip2.distributed import on_rank_0
from blip2.errors import InputError, process_name
from blip2.io import lock_folder, resolve_target
from blip2.training.interruption import TrainingInterrupted

FAILURES_FILE = "failures.log"


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Make the Accelerator of a run, which handles the device, mixed precision, DDP and trackers.

    Raises:
        InputError: the precision is not supported on the device, a tracker is not installed, or torchrun would hang
            after it restarts the processes.
    """
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # The agent's store outlives the processes: restarted processes would look for each other at the old addresses.
        raise InputError(
            "torchrun --max-restarts would hang after a restart: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the"
            " environment of torchrun, or leave out --max-restarts"
        )
    device = choose_device(recipe.training.device)
    precision = recipe.training.precision or ("bf16" if device.type == "cuda" else "fp32")
    # Parameters without a gradient: the head of a loss that is switched off, the layers of an image encoder after the
    # one whose output is used, and the text output of the last block if the Q-Former reads questions.
    all_parameters_used = not (recipe.optimizer.trains("vision") or recipe.qformer.use_qformer_text_input) and (
        recipe.stage == "generation" or all(recipe.objectives.stage1.values())
    )
    if precision == "fp16" and device.type == "cpu":
        raise InputError(
            "training.precision is fp16, which needs a GPU, but the run uses a CPU: set training.precision to bf16 or"
            " fp32"
        )
    installed = {tracker.value for tracker in get_available_trackers()}
    missing = [name for name in recipe.training.report_to if name not in installed]
    if missing:
        raise InputError(
            f"training.report_to names {', '.join(missing)}, which cannot be imported: pip install {' '.join(missing)},"
            " or remove the name"
        )
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision={"fp32": "no"}.get(precision, precision),
        log_with=list(recipe.training.report_to) or None,
        project_dir=recipe.output,
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=not all_parameters_used),
            InitProcessGroupKwargs(timeout=timedelta(seconds=recipe.training.ddp_timeout)),
        ],
    )


@contextlib.contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Lock the folder of a run; see :func:`blip2.io.lock_folder`. All processes must call it; rank 0 takes the lock.

    Raises:
        InputError: another run has locked the folder, or the folder cannot be written. All processes raise the error.
    """
    with contextlib.ExitStack() as stack:
        on_rank_0(lambda: stack.enter_context(lock_folder(folder)))
        yield


@contextlib.contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Use only deterministic operations of PyTorch if `enabled`; see ``training.full_determinism``.

    Enter this context before any work on a GPU, because cuBLAS reads its environment variable only once.
    """
    if not enabled:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(previous)


@contextlib.contextmanager
def log_failures(run: Path) -> Iterator[None]:
    """In a distributed run, append the error of a process that fails to ``failures.log``, with the rank and the host.

    The error file of torchrun is not used: torchrun does not restart the processes if it reads a half-written file.
    """
    try:
        yield
    except TrainingInterrupted:
        raise
    except Exception as error:
        if process_name():
            description = f"error: {error}\n" if isinstance(error, InputError) else traceback.format_exc()
            with contextlib.suppress(OSError, InputError), resolve_target(run / FAILURES_FILE).open("a") as file:
                # One write, so that the entries of several processes do not mix.
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {process_name()}\n{description}\n")
        raise
