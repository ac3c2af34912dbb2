"""The processes of a run: how they find each other, and how one says that it failed."""

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
from blip2.distributed import gather_objects, process_index
from blip2.errors import InputError, process_name
from blip2.io import locked
from blip2.training.interruption import Interruption

FAILURES = "failures.log"


def make_accelerator(recipe: Recipe) -> Accelerator:
    """What accelerate does for a run: devices, precision, DDP, trackers.

    Raises:
        InputError: the precision does not go with the device, a tracker is not installed, or torchrun would hang when
            it begins the processes again.
    """
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # Its store outlives the processes, and those that follow look for each other where the dead ones were.
        raise InputError(
            "--max-restarts would hang: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of torchrun, or"
            " leave it out"
        )
    device = choose_device(recipe.training.device)
    precision = recipe.training.precision or ("bf16" if device.type == "cuda" else "fp32")
    # Without one of the losses its head has no gradient; nor has what an image encoder does after our layer, or what
    # the last block makes of a question.
    losses = recipe.objectives
    all_used = not (recipe.optimizer.trains("vision") or recipe.qformer.use_qformer_text_input) and (
        recipe.stage == "generation" or (losses.itc > 0 and losses.itm > 0 and losses.itg > 0)
    )
    if precision == "fp16" and device.type == "cpu":
        raise InputError("training.precision fp16 needs a GPU: use bf16 or fp32 on a CPU")
    installed = {tracker.value for tracker in get_available_trackers()}
    missing = [name for name in recipe.training.report_to if name not in installed]
    if missing:
        raise InputError(
            f"training.report_to names {', '.join(missing)}, which cannot be imported: pip install {' '.join(missing)}"
        )
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision={"fp32": "no"}.get(precision, precision),
        log_with=list(recipe.training.report_to) or None,
        project_dir=recipe.output,
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=not all_used),
            InitProcessGroupKwargs(timeout=timedelta(seconds=recipe.training.ddp_timeout)),
        ],
    )


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold a folder for the processes of this run alone, of which the first does it for all; see
    :func:`blip2.io.locked`. All of them call this.

    Raises:
        InputError: in all of them: processes of another run hold it, or it cannot be written.
    """
    problem = None
    with contextlib.ExitStack() as stack:
        if process_index() == 0:
            try:
                stack.enter_context(locked(folder))
            except InputError as error:
                problem = str(error)
        problem = gather_objects(problem)[0]
        if problem is not None:
            raise InputError(problem)
        yield


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Use only operations that give the same bits each time, while `wanted`; see ``training.full_determinism``.

    cuBLAS reads its setting when it is first used, so this comes before anything runs on a GPU.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def naming_failures(run: Path) -> Iterator[None]:
    """Of several processes, one that fails writes why into ``failures.log`` of the run, with its number and machine.

    torchrun's own file of errors is left alone: it is read while it may be half written, and then nothing is begun
    again.
    """
    try:
        yield
    except Interruption:
        raise
    except Exception as error:
        if process_name():
            about = f"error: {error}\n" if isinstance(error, InputError) else traceback.format_exc()
            with contextlib.suppress(OSError), (run / FAILURES).open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {process_name()}\n{about}\n")  # at once
        raise
