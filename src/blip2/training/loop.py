"""One training loop for every stage.

The loop does not know the objective: a stage gives back a dict of named losses, and the loop weights, sums, logs and
steps. Started again it goes on exactly where its last checkpoint was: the position in the data is kept, and all
randomness of a step (dropout, hard negatives) is seeded from (seed, step, process).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed
from torch import nn

from blip2.build import Built, build, choose_device, prepare_texts
from blip2.config import Recipe
from blip2.data.assets import resolve
from blip2.data.batches import Loaded, Preparation, Skipped, plan_evaluation, to_device
from blip2.data.loading import load
from blip2.data.mixtures import Preparations, mix, plan_mixture, start_anew
from blip2.data.records import Records, RecordStream, open_records
from blip2.data.texts import StageBatch
from blip2.errors import InputError
from blip2.interop.formats import is_pickle, open_foreign
from blip2.model.distributed import gather_objects
from blip2.model.generation import GenerationModel
from blip2.model.objectives import Outcome
from blip2.recipe import dump_recipe
from blip2.training import checkpoint
from blip2.training.features import cached_features, summary
from blip2.training.interruption import Interruption, note_signals
from blip2.training.optimizer import build_optimizer, describe, restore_optimizer, set_rates, set_schedule
from blip2.training.progress import METRICS, SKIPPED, Display, StepFile, note
from blip2.training.tally import Tally

BROKEN_IN_A_ROW = 10
"""So many batches without a single good image stop a run."""


def train(recipe: Recipe, resume: bool = False) -> Path:
    """Train one stage.

    Under ``torchrun`` or ``accelerate launch`` each process trains on its own batches of ``data.batch_size``.

    Args:
        resume: go on from the last checkpoint in ``recipe.output``, if there is one.

    Returns:
        The folder of the last checkpoint.

    Raises:
        InputError: the recipe asks for something that is not there or does not fit, the data is unusable, the disk is
            full, or the loss is no longer finite. Earlier checkpoints stay.
        Interruption: after SIGTERM or SIGINT, with a checkpoint of the step that was under way.
    """
    run = Path(recipe.output)
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output {run} cannot be made a folder ({error.strerror}): give another output") from error
    last = checkpoint.latest(run)
    if last is not None and not resume:
        raise InputError(
            f"{run} already holds a run (its last checkpoint is {last.name}): go on with --resume, or give another"
            " output"
        )
    accelerator = _accelerator(recipe)
    display = Display(run.name, enabled=accelerator.is_main_process)
    try:
        return _Training(recipe, accelerator, display, last).run()
    except OSError as error:
        if not checkpoint.is_full(error):
            raise
        raise checkpoint.no_room(run, f"writing to {run}") from error
    finally:
        display.close()
        accelerator.end_training()
        # Otherwise the next run of this process could not have another precision.
        AcceleratorState._reset_state(reset_partial_state=True)  # pyright: ignore[reportPrivateUsage]


def _accelerator(recipe: Recipe) -> Accelerator:
    device = choose_device(recipe.training.device)
    precision = recipe.training.precision or ("bf16" if device.type == "cuda" else "fp32")
    # Without one of the losses its head has no gradient; nor has what an image encoder does after our layer, or what
    # the last block makes of a question.
    losses = recipe.objectives
    all_used = not (recipe.optimizer.trains("vision") or recipe.qformer.reads_questions) and (
        recipe.stage == "generation" or (losses.itc > 0 and losses.itm > 0 and losses.itg > 0)
    )
    if precision == "fp16" and device.type == "cpu":
        raise InputError("training.precision fp16 needs a GPU: use bf16 or fp32 on a CPU")
    installed = {tracker.value for tracker in get_available_trackers()}
    missing = [name for name in recipe.training.trackers if name not in installed]
    if missing:
        raise InputError(
            f"training.trackers names {', '.join(missing)}, which cannot be imported: pip install {' '.join(missing)}"
        )
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision={"fp32": "no"}.get(precision, precision),
        log_with=list(recipe.training.trackers) or None,
        project_dir=recipe.output,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=not all_used)],
    )


class _Training:
    """What one call of :func:`train` holds together."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, display: Display, last: Path | None) -> None:
        self.recipe, self.accelerator, self.display = recipe, accelerator, display
        self.folder = Path(recipe.output)
        state = optimizer_state = None
        if last is not None:
            state, optimizer_state = checkpoint.read_state(last)
            display.say(f"going on from {last}")
        self.step: int = state["step"] if state else 0

        set_seed(recipe.training.seed)
        going_on = None if last is None else checkpoint.open_own(last)
        built = build(recipe, accelerator.device, going_on)
        self.built = built
        rates = set_rates(built.model, recipe.optimizer)
        if going_on is not None:
            checkpoint.load_weights(going_on, built.model)
        elif recipe.start_from is not None:
            start_from(recipe, built, display)
        if accelerator.is_main_process:
            display.table(
                f"stage: {recipe.stage}", ["part", "parameters", "state", "dtype"], describe(built.model, rates)
            )
        if recipe.vision.drop_path:
            if built.model.vision.is_frozen:
                raise InputError(
                    f"vision.drop_path is {recipe.vision.drop_path}, but optimizer.rates freezes the image encoder: set"
                    ' it to 0, or give "vision.*" a rate'
                )
            built.model.vision.drop_path(recipe.vision.drop_path)
        built.model.qformer.checkpointing = recipe.training.activation_checkpointing
        if recipe.training.compile:
            built.model.qformer.compile_blocks()
            if built.model.vision.is_frozen:
                built.model.vision.compile_network()
        positions = state["positions"] if state else []
        self.loaded, self.validation = self._open_data(self._own(positions, display))

        self.model: nn.Module
        self.model, self.optimizer = accelerator.prepare(
            built.model, build_optimizer(built.model, rates, recipe.optimizer)
        )
        if optimizer_state is not None:
            restore_optimizer(self.optimizer, optimizer_state["optimizer"])
            if accelerator.scaler is not None and optimizer_state["scaler"]:
                accelerator.scaler.load_state_dict(optimizer_state["scaler"])
        self.tally = Tally(list(recipe.data.sources), state["counts"] if state else None)

    def _own(self, positions: list[Any], display: Display) -> Any:
        """The position in the data of this process."""
        if not positions:
            return None
        if len(positions) == self.accelerator.num_processes:
            return positions[self.accelerator.process_index]
        display.say(
            f"the checkpoint is of {len(positions)} processes and there are {self.accelerator.num_processes} now: the"
            " data goes on with the next epoch of each source"
        )
        return start_anew(positions)

    # -- data --------------------------------------------------------------------------------------------------------

    def _open_data(self, position: Any) -> tuple[Iterator[Loaded], Preparation | None]:
        recipe, data = self.recipe, self.recipe.data
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        texts = prepare_texts(recipe, self.built)
        encoder = self.built.model.vision

        def prepare(source: str, train: bool) -> tuple[Records | RecordStream, Preparation]:
            with self.accelerator.main_process_first():
                records = open_records(resolve(source), data, process, processes)
            features = None
            if data.cached_views:
                views = data.cached_views if train else 1
                features = cached_features(recipe, records, encoder, views, self.accelerator.device)
                self.display.say(f"features of {source}: {summary(features)}")
            preparation = Preparation(
                records, texts, encoder.preprocessing, train, data.smallest_crop, data.flip, features
            )
            return records, preparation

        opened, preparations = zip(*(prepare(source, train=True) for source in data.sources), strict=True)
        sources = mix(data.sources, opened, data.temperature)
        if len(sources) > 1:
            rows = [(source.name, f"{100 * source.share:.3g} %") for source in sources]
            self.display.table("data.train", ["source", "share of the steps"], rows)
        plans = plan_mixture(
            sources, data.batch_size, recipe.training.seed, data.group_by_length, process, processes,
            recipe.training.accumulate, position,
        )  # fmt: skip
        validation = None
        if data.validation is not None:
            held_out, validation = prepare(data.validation, train=False)
            if not isinstance(held_out, Records):
                raise InputError("data.validation is a stream, expected a table or folder: set data.streaming to false")
        return load(plans, Preparations(preparations), data.workers), validation

    def _next(self) -> tuple[Loaded, StageBatch]:
        for _ in range(BROKEN_IN_A_ROW):
            loaded = next(self.loaded)
            self.tally.add(loaded)
            if loaded.batch is not None:
                return loaded, to_device(loaded.batch, self.accelerator.device)
        raise InputError(
            f"the last {BROKEN_IN_A_ROW} batches held no image that can be used; the last message was:"
            f" {loaded.skipped[-1]}"  # pyright: ignore[reportPossiblyUnboundVariable]
        )

    # -- steps -------------------------------------------------------------------------------------------------------

    def run(self) -> Path:
        recipe, accelerator = self.recipe, self.accelerator
        total = recipe.training.steps
        if accelerator.is_main_process:
            (self.folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
            for name in (METRICS, SKIPPED):
                StepFile.truncate(self.folder / name, self.step)
        if recipe.training.trackers:
            accelerator.init_trackers("blip2", config={"recipe": dump_recipe(recipe)})
        saved = checkpoint.latest(self.folder)
        self.display.start(total, self.step)
        files = [StepFile(self.folder / name, enabled=accelerator.is_main_process) for name in (METRICS, SKIPPED)]
        with note_signals() as asked, contextlib.closing(files[0]) as metrics, contextlib.closing(files[1]) as skipped:
            while self.step < total:
                started = time.monotonic()
                values, pairs = self._step()
                self.step += 1
                seconds = time.monotonic() - started
                values |= {"images_per_second": pairs / seconds, "seconds": seconds}
                self.tally.report(self.step, skipped, self.display, recipe.data.max_tokens)
                if self.validation is not None and (
                    self.step % recipe.training.validate_every == 0 or self.step == total
                ):
                    values |= self._validate(self.validation)
                metrics.write({"step": self.step, **values, **self.tally.metrics()})
                if recipe.training.trackers:
                    of = self.tally.step_source  # a curve for each source
                    accelerator.log({**values, **({f"loss/{of}": values["loss"]} if of else {})}, step=self.step)
                self.tally.check(recipe.data.max_bad, skipped.path)
                self.display.advance(self.step, note(values))
                stop = self._any_asked(asked)
                if self.step % recipe.training.save_every == 0 or self.step == total or stop:
                    saved = self._save()
                if stop and self.step < total:
                    raise Interruption(
                        f"stopped at step {self.step} of {total}; its checkpoint is {saved}; go on with --resume"
                    )
        if self.tally.skipped or self.tally.cut:
            self.display.say(f"{self.tally.skipped} records skipped, {self.tally.cut} captions cut")
        assert saved is not None
        return saved

    def _step(self) -> tuple[dict[str, float], int]:
        """One optimiser step; its metrics, and how many pairs all processes saw."""
        recipe, accelerator = self.recipe, self.accelerator
        set_seed(_mix(recipe.training.seed, self.step, accelerator.process_index))
        share = set_schedule(self.optimizer, self.step, recipe.training.steps, recipe.optimizer)
        taken = [self._next() for _ in range(recipe.training.accumulate)]
        self.positions = taken[-1][0].position
        batches = [batch for _, batch in taken]

        # Labels a micro-batch has on average over all of the step, so that losses add up to one mean over all labels.
        labels = torch.tensor(float(sum(batch.label_count for batch in batches)), device=accelerator.device)
        label_count = float(self._reduce(labels, "mean")) / len(batches)

        self.optimizer.zero_grad()
        sums: dict[str, torch.Tensor] = {}
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                outcome: Outcome = self.model(batch, label_count)
                loss = self._weighted(outcome)
                accelerator.backward(loss / len(batches))
            for name, value in {"loss": loss, **outcome.losses, **outcome.metrics}.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value.detach() / len(batches)

        names = sorted(sums)
        own = torch.tensor(self.tally.own(), device=accelerator.device)  # travels with them
        means = self._reduce(torch.cat([torch.stack([sums[name].float() for name in names]), own]), "mean").tolist()
        values: dict[str, float] = dict(zip(names, means, strict=False))
        self.tally.close([round(mean * accelerator.num_processes) for mean in means[len(names) :]])
        self._check_finite(values["loss"], sums["loss"], taken)
        if recipe.optimizer.clip_norm is not None:
            total = accelerator.clip_grad_norm_(self.model.parameters(), recipe.optimizer.clip_norm)
            norm = float(cast(torch.Tensor, total))
            if accelerator.scaler is None:  # with one, an overflow only skips the step
                self._check_finite(norm, sums["loss"], taken, "gradient")
            values["gradient_norm"] = norm
        self.optimizer.step()
        values["rate_share"] = share
        pairs = sum(len(loaded.keys) for loaded, _ in taken) * accelerator.num_processes
        return values, pairs

    def _weighted(self, outcome: Outcome) -> torch.Tensor:
        weights = vars(self.recipe.objectives)
        terms = [weights.get(name, 1.0) * loss for name, loss in outcome.losses.items()]
        return torch.stack(terms).sum()

    def _check_finite(
        self, value: float, own_loss: torch.Tensor, taken: list[tuple[Loaded, StageBatch]], what: str = "loss"
    ) -> None:
        """Stop before weights are spoiled, and say in which batch it happened."""
        if math.isfinite(value):
            return
        keys = [key for loaded, _ in taken for key in loaded.keys]
        guilty = what == "gradient" or not bool(torch.isfinite(own_loss))
        found = [key for keys in gather_objects(keys if guilty else []) for key in keys]
        last = checkpoint.latest(self.folder)
        raise InputError(
            f"the {what} is {value} at step {self.step + 1}, in the batch of {', '.join(found[:8])}"
            f"{f' and {len(found) - 8} more' if len(found) > 8 else ''}; nothing was changed, the last good checkpoint"
            f" is {last or 'none'}: lower optimizer.rates, or train in fp32"
        )

    @torch.no_grad()
    def _validate(self, preparation: Preparation) -> dict[str, float]:
        """Mean losses and metrics over the held-out pairs, with the same draws every time."""
        accelerator, data = self.accelerator, self.recipe.data
        assert preparation.records is not None
        set_seed(self.recipe.training.seed)
        model = accelerator.unwrap_model(self.model).eval()
        sums: dict[str, torch.Tensor] = {}
        skipped: list[Skipped] = []
        weight = torch.zeros((), device=accelerator.device)
        with accelerator.autocast():
            plans = plan_evaluation(
                preparation.records, data.batch_size, accelerator.process_index, accelerator.num_processes
            )
            for loaded in load(plans, preparation, 0):
                skipped += loaded.skipped
                if loaded.batch is None:
                    continue
                outcome = model(to_device(loaded.batch, accelerator.device))
                for name, value in {**outcome.losses, **outcome.metrics}.items():
                    sums[name] = sums.get(name, torch.zeros_like(weight)) + value.float() * len(loaded.keys)
                weight += len(loaded.keys)
        model.train()
        if skipped:
            self.display.say(f"skipped {len(skipped)} records of data.validation; the first is {skipped[0]}")
        # A process may have had no record of its own.
        names = sorted({name for found in gather_objects(list(sums)) for name in found})
        zero = torch.zeros_like(weight)
        totals = self._reduce(torch.stack([*(sums.get(name, zero) for name in names), weight]), "sum").tolist()
        count = totals.pop()
        return {f"validation_{name}": total / count for name, total in zip(names, totals, strict=True)}

    def _save(self) -> Path:
        accelerator = self.accelerator
        positions = gather_objects(self.positions)
        path = self.folder
        if accelerator.is_main_process:
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            path = checkpoint.save(
                self.folder,
                self.step,
                accelerator.unwrap_model(self.model),
                self.recipe,
                self.built.qformer_tokenizer,
                {"optimizer": self.optimizer.state_dict(), "scaler": scaler},
                {"positions": positions, "counts": self.tally.metrics()},
                self.recipe.training.keep,
            )
        accelerator.wait_for_everyone()
        return path

    def _reduce(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
        """The sum or mean over all processes."""
        return cast(torch.Tensor, self.accelerator.reduce(tensor, how))

    def _any_asked(self, asked: list[int]) -> bool:
        flag = torch.tensor(float(bool(asked)), device=self.accelerator.device)
        return bool(self._reduce(flag, "sum"))


def start_from(recipe: Recipe, built: Built, display: Display) -> None:
    """Load the trained weights of a checkpoint of any format, of this stage or of the one before."""
    assert recipe.start_from is not None
    known: dict[str, object] = {"vision.name": recipe.vision.name, "qformer.heads": recipe.qformer.heads}
    if recipe.language is not None:
        known["language.name"] = recipe.language.name
    name = recipe.start_from  # a pickle says nothing of its frozen parts
    found = (open_foreign(name, known) if is_pickle(name) else None) or checkpoint.open_checkpoint(name)
    new = checkpoint.load_previous_stage(found, built.model)
    if isinstance(built.model, GenerationModel) and "projection.weight" in new:
        built.model.initialise_projection()
    parts = sorted({name.split(".")[0] for name in new})
    display.say(f"starting from {found.name} ({found.about})" + (f"; new: {', '.join(parts)}" if parts else ""))
    if found.holds_vision and found.name not in (recipe.vision.name, str(Path(recipe.vision.name).absolute())):
        display.say(f"its own image encoder is left out for vision.name {recipe.vision.name}")
    for key, of in (("image_norm_eps", "qformer"), ("activation", "language")):
        theirs, ours = (getattr(getattr(each, of), key, None) for each in (found.recipe, recipe))
        if theirs != ours and getattr(found.recipe, of) is not None:
            display.say(f"its {of}.{key} is {theirs}, the recipe's {ours}: results begin a little apart")


def _mix(seed: int, step: int, process: int) -> int:
    """One number below 2**32 for a step of a process."""
    return (seed * 1_000_003 + step * 10_007 + process * 101) % 2**32
