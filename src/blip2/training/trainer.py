"""The training loop of both stages.

The trainer knows nothing of the objectives: a stage returns named losses, and the trainer weights, sums and logs them
and steps the optimizer. A resumed run continues exactly where its last checkpoint was: the checkpoint stores the
position in the data, and all randomness of a step is seeded, dropout from (seed, step, rank) and hard negatives from
(seed, step). Without dropout, the same global batch therefore gives the same step on any number of processes.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import nn

from blip2 import checkpoint
from blip2.builder import with_absolute_paths
from blip2.config import FEATURES, MODULE, Recipe
from blip2.console import Display
from blip2.data.assets import resolve
from blip2.data.collate import StageBatch
from blip2.data.dataset import LoadedBatch, to_device
from blip2.distributed import all_gather_objects
from blip2.errors import InputError
from blip2.io import atomic_write, check_utf8
from blip2.model.generation import GenerationModel
from blip2.model.losses import LossOutput
from blip2.recipe import dump_config
from blip2.training.data_stats import DataStats
from blip2.training.interruption import TrainingInterrupted, catch_signals
from blip2.training.launch import deterministic_algorithms, lock_run, log_failures, make_accelerator
from blip2.training.metrics import (
    METRICS_FILE,
    SKIPPED_FILE,
    JsonlLog,
    format_progress,
    from_mean,
    to_addend,
)
from blip2.training.monitor import FrozenFiles, SystemMonitor
from blip2.training.optimizer import build_optimizer, optimizer_state_by_name, restore_optimizer, update_learning_rate
from blip2.training.setup import (
    check_held_out,
    configure_model,
    initialize_projection,
    is_sharded,
    load_model,
    open_data,
    shard_model,
)
from blip2.training.sharding import ignore_frozen_in_ddp, move_trainable
from blip2.training.validation import (
    Evaluator,
    best_metric,
    is_better,
    measurement_settings,
    run_evaluation,
    validate,
)

MAX_EMPTY_BATCHES = 10
"""Abort after this many consecutive batches without a usable image."""
COLLAPSE_THRESHOLD = 0.95
"""Mean cosine similarity between the output queries of an image above which a warning is logged."""
COLLAPSE_MIN_STEP = 50
"""First step at which the similarity is checked: untrained queries are similar to each other."""


def train(
    recipe: Recipe,
    resume: bool = False,
    make_evaluator: Callable[[Recipe], Evaluator] | None = None,
    encoder: nn.Module | None = None,
) -> Path:
    """Train one stage.

    Under ``torchrun`` or ``accelerate launch``, each process trains on its own batches of ``data.batch_size``.

    Args:
        recipe: the settings of the run.
        resume: continue from the last checkpoint in ``recipe.output``, if there is one.
        make_evaluator: makes the evaluator of a recipe with an ``evaluation`` section; :func:`blip2.train` passes one.
        encoder: the image encoder, for a recipe with ``vision.name`` module or features; see :func:`blip2.train`.

    Returns:
        The folder of the last checkpoint.

    Raises:
        InputError: a file or a model that the recipe names does not exist or does not fit, the data is unusable, the
            disk is full, or the loss is not finite. Earlier checkpoints are kept.
        TrainingInterrupted: SIGTERM, SIGINT or SIGHUP was received; the current step has been completed and saved.
    """
    recipe = with_absolute_paths(recipe)
    run = Path(recipe.output)
    check_utf8(run)
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot create the folder of the run, {run} ({error.strerror}): give another output"
        ) from error
    if recipe.evaluation is not None and make_evaluator is None:
        raise InputError(
            "the recipe has a section evaluation, but make_evaluator is None: call blip2.train, or remove the section"
        )
    accelerator = make_accelerator(recipe)
    display = Display(run.name, enabled=accelerator.is_main_process)
    try:
        with lock_run(run):
            last = checkpoint.latest_checkpoint(run)
            if last is not None and not resume:
                raise InputError(
                    f"{run} already holds a run (its last checkpoint is {last.name}): rerun with --resume, or give"
                    " another output"
                )
            with log_failures(run), deterministic_algorithms(recipe.training.full_determinism):
                return Trainer(recipe, accelerator, display, last, make_evaluator, encoder).fit()
    except OSError as error:
        if checkpoint.is_disk_full(error):
            raise checkpoint.disk_full_error(run, f"writing to {run}") from error
        if error.filename is None or not Path(str(error.filename)).absolute().is_relative_to(run):
            raise
        raise InputError(
            f"{error.filename} cannot be written or read ({error.strerror}): check this file and its folder, then rerun"
            " with --resume"
        ) from error
    finally:
        display.close()
        accelerator.end_training()
        # Otherwise the next run in this process could not use another precision.
        AcceleratorState._reset_state(reset_partial_state=True)  # pyright: ignore[reportPrivateUsage]


class Trainer:
    """The state of one training run.

    The constructor sets the run up, :meth:`fit` is the loop, and :meth:`step` is one optimizer step.

    Args:
        recipe: the settings of the run.
        accelerator: the result of :func:`make_accelerator`.
        display: the terminal.
        last: the checkpoint to resume from. None: start a new run.
        make_evaluator: makes the evaluator of a recipe with an ``evaluation`` section.
        encoder: the image encoder, for a recipe with ``vision.name`` module or features.

    Raises:
        InputError: as for :func:`train`.
    """

    # -- setup -------------------------------------------------------------------------------------------------------

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        display: Display,
        last: Path | None,
        make_evaluator: Callable[[Recipe], Evaluator] | None,
        encoder: nn.Module | None = None,
    ) -> None:
        self.accelerator, self.display, self.folder = accelerator, display, Path(recipe.output)
        self.monitor = SystemMonitor(accelerator.device)
        self.is_sharded = is_sharded(recipe, accelerator)
        state: dict[str, Any] = {}
        optimizer_state: dict[str, Any] | None = None
        if last is not None:
            state, optimizer_state = checkpoint.read_training_state(last)
            display.log(f"resuming from {last}")
        self.global_step: int = state.get("step", 0)
        self.pending_metrics: dict[str, float] | None = state.get("unfinished")
        """Metrics of the last step, if the run was stopped before its validation or evaluation was complete."""
        self.best: float | None = None
        self.best_since: int = state.get("best_since", 0)
        """Step after which the best value counts: earlier values were measured with other settings."""
        self.measured_with = measurement_settings(recipe, accelerator.num_processes)
        if self.measured_with["metric"] and state.get("measured_with", self.measured_with) != self.measured_with:
            # What is pending will be measured with the new settings.
            pending = self.pending_metrics
            self.best_since = self.global_step - (pending is not None and self.measured_with["metric"] not in pending)
            display.log(
                f"the best checkpoint is one of those after step {self.best_since} from now on, because"
                " training.metric_for_best_model was measured with other settings until then"
            )
        self.has_warned_of_collapse = False

        set_seed(recipe.training.seed)
        resume_from = None if last is None else checkpoint.open_native(last)
        names = [recipe.language.name] if recipe.language else []
        names += [] if recipe.vision.name in (FEATURES, MODULE) else [recipe.vision.name]
        self.frozen_files = FrozenFiles(resolve(name) for name in names)
        loaded = load_model(recipe, accelerator, resume_from, display, encoder)
        self.built, self.recipe = loaded.built, loaded.recipe
        configure_model(self.recipe, self.built, accelerator, display)
        self.data = open_data(self.recipe, self.built, accelerator, display, state.get("positions", []))
        self.data_stats = DataStats(list(recipe.data.sources), state.get("counts"))
        language = self.recipe.language
        if language is not None and language.projection_init == "least_squares" and loaded.has_new_projection:
            assert isinstance(self.built.model, GenerationModel)
            initialize_projection(self.recipe, self.built.model, self.data, display)
        self.evaluator = self._make_evaluator(make_evaluator)
        check_held_out(self.recipe, self.data.opened, display)
        self._prepare(loaded.rates)
        if optimizer_state is not None:
            self._restore_optimizer(optimizer_state)

    def _make_evaluator(self, make_evaluator: Callable[[Recipe], Evaluator] | None) -> Evaluator | None:
        if self.recipe.evaluation is None or make_evaluator is None:
            return None
        with self.accelerator.main_process_first():
            evaluator = make_evaluator(self.recipe)
        self.data.opened.append(("evaluation.data", self.recipe.evaluation.data, evaluator.records))
        return evaluator

    def _prepare(self, rates: dict[str, float]) -> None:
        """Make the optimizer, wrap the model for distributed training, and shard the frozen parts."""
        model, accelerator = self.built.model, self.accelerator
        ignore_frozen_in_ddp(model)
        if self.is_sharded:
            move_trainable(model, accelerator.device)
        optimizer = build_optimizer(model, rates, self.recipe.optimizer)
        self.model: nn.Module
        self.model, self.optimizer = accelerator.prepare(model, optimizer, device_placement=[not self.is_sharded, True])
        if self.is_sharded:
            shard_model(self.recipe, self.built, accelerator.device, self.display)

    def _restore_optimizer(self, state: dict[str, Any]) -> None:
        for line in restore_optimizer(self.optimizer, self.built.model, state["optimizer"]):
            self.display.log(line)
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    # -- fit ---------------------------------------------------------------------------------------------------------

    def fit(self) -> Path:
        """Train up to ``training.max_steps``, and write metrics and checkpoints.

        Returns:
            The folder of the last checkpoint.

        Raises:
            InputError: as for :func:`train`.
            TrainingInterrupted: as for :func:`train`.
        """
        recipe, accelerator = self.recipe, self.accelerator
        max_steps = recipe.training.max_steps
        if accelerator.is_main_process:
            self._write_recipe()
            # The line of a step whose evaluation is pending is not written yet.
            JsonlLog.truncate(self.folder / METRICS_FILE, self.global_step - (self.pending_metrics is not None))
            JsonlLog.truncate(self.folder / SKIPPED_FILE, self.global_step)
            self.best = best_metric(self.folder, recipe.training.metric_for_best_model, self.best_since)
        if recipe.training.report_to:
            accelerator.init_trackers("blip2", config={"recipe": dump_config(recipe)})
        saved = checkpoint.latest_checkpoint(self.folder)
        if self.global_step >= max_steps:
            self.display.log(f"no step is left: the run has {self.global_step}, and training.max_steps is {max_steps}")
        self.display.start(max_steps, self.global_step)
        logs = [JsonlLog(self.folder / name, accelerator.is_main_process) for name in (METRICS_FILE, SKIPPED_FILE)]
        metrics, skipped = logs
        with catch_signals() as received, contextlib.closing(metrics), contextlib.closing(skipped):
            if self.pending_metrics is not None:
                if "validation_loss" not in self.pending_metrics and not self.is_sharded:  # it has failed
                    self.pending_metrics |= self._validate()
                self._finish_step(self.pending_metrics, metrics)
            while self.global_step < max_steps:
                started = time.monotonic()
                values, num_pairs = self.step()
                self.global_step += 1
                seconds = time.monotonic() - started
                values |= {"images_per_second": num_pairs / seconds, "seconds": seconds}
                self.data_stats.log_skipped(self.global_step, skipped, self.display, recipe.data.max_length)
                with self._saving_before_error(values):
                    values |= self._validate()
                self._warn_of_collapse(values)
                system_metrics, stop = self.monitor.collect(bool(received), seconds)
                values |= system_metrics
                # A step with an evaluation or a metric for the best model is saved first: a kill then loses neither.
                is_measured = self._is_evaluated or recipe.training.metric_for_best_model in values
                if is_measured:
                    saved = self._save(values)
                self._finish_step(values, metrics)
                with self._saving_before_error():
                    self.data_stats.check_bad_fraction(recipe.data.max_bad_fraction, skipped.path)
                self.display.update(self.global_step, format_progress(values))
                if not is_measured and (self._is_due(recipe.training.save_steps) or stop):
                    saved = self._save()
                if stop and self.global_step < max_steps:
                    raise TrainingInterrupted(
                        f"stopped at step {self.global_step} of {max_steps}; its checkpoint is {saved}; rerun with"
                        " --resume"
                    )
        if self.data_stats.num_skipped or self.data_stats.num_truncated:
            self.display.log(
                f"{self.data_stats.num_skipped} records skipped, {self.data_stats.num_truncated} captions truncated"
            )
        assert saved is not None
        return saved

    @contextlib.contextmanager
    def _saving_before_error(self, pending_metrics: dict[str, float] | None = None) -> Iterator[None]:
        """Save a checkpoint of the current step before an error about the data or the recipe ends the run.

        All processes must raise the error.

        Args:
            pending_metrics: see :meth:`_save`.
        """
        try:
            yield
        except InputError:
            self._save(pending_metrics)
            raise

    def _is_due(self, every: int) -> bool:
        """Return whether an action that is done every `every` steps, and after the last step, is due now."""
        return self.global_step % every == 0 or self.global_step == self.recipe.training.max_steps

    @property
    def _is_evaluated(self) -> bool:
        """Whether the current step is evaluated."""
        return self.recipe.evaluation is not None and self._is_due(self.recipe.evaluation.eval_steps)

    def _validate(self) -> dict[str, float]:
        if self.data.validation is None or not self._is_due(self.recipe.training.eval_steps):
            return {}
        dummy_batch = self.last_batch if self.is_sharded else None
        return validate(
            self.built.model, self.data.validation, self.recipe, self.accelerator, self.display.log, dummy_batch
        )

    def _warn_of_collapse(self, values: dict[str, float]) -> None:
        """Warn once if the output queries of an image have become one vector."""
        similarity = values.get("query_similarity", 0.0)
        has_collapsed = similarity > COLLAPSE_THRESHOLD and self.global_step >= COLLAPSE_MIN_STEP
        if not has_collapsed or self.has_warned_of_collapse:
            return
        self.has_warned_of_collapse = True
        self.display.log(
            f"the queries have collapsed: at step {self.global_step} the mean cosine similarity between the queries of"
            f" an image is {similarity:.3f}, so that {self.recipe.qformer.num_query_tokens} queries carry hardly more"
            f" information than one: raise objectives.query_diversity, which is"
            f" {self.recipe.objectives.query_diversity:g}, and start again (docs/troubleshooting.md)"
        )

    def _finish_step(self, values: dict[str, float], metrics: JsonlLog) -> None:
        """Evaluate the current step if that is due, keep the best checkpoint, and write the step's metrics."""
        if self._is_evaluated and self.evaluator is not None:
            values |= run_evaluation(self.evaluator, self.built, self.global_step, self.recipe, self.display)
        name = self.recipe.training.metric_for_best_model
        if name in values and self.global_step > self.best_since:
            if self.accelerator.is_main_process and is_better(values[name], self.best, name):
                checkpoint.save_best(self.folder, self.global_step, {"metric": name, "value": values[name]})
                self.best = values[name]
                self.display.log(f"step {self.global_step} is the best so far: {name} {values[name]:.4f}")
            self.accelerator.wait_for_everyone()
        metrics.write({"step": self.global_step, **values, **self.data_stats.metrics()})
        if self.recipe.training.report_to:
            source = self.data_stats.step_source  # a curve for each source
            per_source = {f"loss/{source}": values["loss"]} if source else {}
            self.accelerator.log({**values, **per_source}, step=self.global_step)

    # -- step --------------------------------------------------------------------------------------------------------

    def step(self) -> tuple[dict[str, float], int]:
        """Do one optimizer step.

        Returns:
            The step's metrics, as means over all processes, and the number of pairs in all processes.
        """
        recipe, accelerator = self.recipe, self.accelerator
        set_seed(derive_seed(recipe.training.seed, self.global_step, accelerator.process_index))
        lr_scale = update_learning_rate(self.optimizer, self.global_step, recipe.training.max_steps, recipe.optimizer)
        loaded = [self.next_batch() for _ in range(recipe.training.gradient_accumulation_steps)]
        self.position = loaded[-1].position
        sums = self._forward_backward(
            [to_device(each.batch, accelerator.device) for each in loaded if each.batch is not None]
        )
        values = self._mean_over_processes(sums)
        self._check_finite(values["loss"], sums["loss"], loaded)
        # Without a limit the norm is needed too: a gradient that is not finite would destroy the weights.
        total_norm = accelerator.clip_grad_norm_(self.model.parameters(), recipe.optimizer.max_grad_norm or math.inf)
        values["gradient_norm"] = float(cast(torch.Tensor, total_norm))
        # The gradient scaler skips steps with an overflow, and lowers the scale until there is none.
        if accelerator.scaler is None or accelerator.scaler.get_scale() < 1:
            self._check_finite(values["gradient_norm"], sums["loss"], loaded, "gradient")
        self.optimizer.step()
        values |= {"rate_share": lr_scale, "rate": max(group["lr"] for group in self.optimizer.param_groups)}
        return values, sum(len(each.keys) for each in loaded) * accelerator.num_processes

    def next_batch(self) -> LoadedBatch:
        """Return the next batch of this process that has a usable image."""
        for _ in range(MAX_EMPTY_BATCHES):
            started = time.monotonic()
            loaded = next(self.data.batches)
            self.monitor.data_seconds += time.monotonic() - started
            self.data_stats.add(loaded)
            if loaded.batch is not None:
                return loaded
        raise InputError(
            f"the last {MAX_EMPTY_BATCHES} batches had no usable image, expected at least one in each batch: correct"
            f" the data of data.train; the last message was: {loaded.skipped[-1]}"  # pyright: ignore[reportPossiblyUnboundVariable]
        )

    def _forward_backward(self, batches: list[StageBatch]) -> dict[str, torch.Tensor]:
        """Accumulate the gradients of the batches; return the means of their losses and metrics."""
        accelerator = self.accelerator
        self.last_batch = batches[-1]
        # All batches divide by the mean number of labels, so that the losses add up to one mean over all labels.
        total_labels = torch.tensor(float(sum(batch.num_labels for batch in batches)), device=accelerator.device)
        num_labels = float(self._reduce(total_labels, "mean")) / len(batches)
        self.optimizer.zero_grad()
        sums: dict[str, torch.Tensor] = {}
        for i, batch in enumerate(batches):
            is_last = i == len(batches) - 1
            with contextlib.nullcontext() if is_last else accelerator.no_sync(self.model):
                shared_seed = derive_seed(self.recipe.training.seed, self.global_step, -1 - i)
                output: LossOutput = self.model(batch, num_labels, seed=shared_seed)
                loss = self._weighted_sum(output.losses)
                accelerator.backward(loss / len(batches))
            for name, value in {"loss": loss, **output.losses, **output.metrics}.items():
                addend = to_addend(name, value.detach()) / len(batches)
                sums[name] = sums.get(name, torch.zeros_like(value)) + addend
        return sums

    def _weighted_sum(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        weight = self.recipe.objectives.weight
        return torch.stack([weight(name) * loss for name, loss in losses.items()]).sum()

    def _mean_over_processes(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """Average metrics over all processes; the counts of :class:`DataStats` are in the same all-reduce."""
        names = sorted(sums)
        counts = torch.tensor(self.data_stats.local_counts(), device=self.accelerator.device)
        packed = torch.cat([torch.stack([sums[name].float() for name in names]), counts])
        means = self._reduce(packed, "mean").tolist()
        self.data_stats.end_step([round(mean * self.accelerator.num_processes) for mean in means[len(names) :]])
        return {name: from_mean(name, mean) for name, mean in zip(names, means, strict=False)}

    def _check_finite(
        self, value: float, local_loss: torch.Tensor, loaded: list[LoadedBatch], what: str = "loss"
    ) -> None:
        """Raise an error that names the records if a loss or a gradient is not finite, before the weights change."""
        if math.isfinite(value):
            return
        is_local = what == "gradient" or not bool(torch.isfinite(local_loss))
        local_keys = [key for each in loaded for key in each.keys] if is_local else []
        keys = [key for rank_keys in all_gather_objects(local_keys) for key in rank_keys]
        last = checkpoint.latest_checkpoint(self.folder)
        raise InputError(
            f"the {what} is {value} at step {self.global_step + 1}, in the batch of {', '.join(keys[:8])}"
            f"{f' and {len(keys) - 8} more' if len(keys) > 8 else ''}; the weights are unchanged, the last good"
            f" checkpoint is {last or 'none'}: lower optimizer.learning_rate, or train in fp32"
        )

    def _reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        """Return the sum or mean over all processes."""
        return cast(torch.Tensor, self.accelerator.reduce(tensor, reduction))

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _write_recipe(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.folder / checkpoint.RECIPE_FILE) as file:
            file.write(dump_config(self.recipe).encode())

    def _save(self, pending_metrics: dict[str, float] | None = None) -> Path:
        """Write a checkpoint of the current step.

        Args:
            pending_metrics: metrics of the step, if the validation or evaluation of the step has not been done yet.
        """
        accelerator = self.accelerator
        gathered = all_gather_objects((self.position, self.frozen_files.changed_files()))
        changed = sorted({file for _, files in gathered for file in files})
        if changed:
            last = checkpoint.latest_checkpoint(self.folder)
            raise InputError(
                f"{changed[0]} was changed while this run uses it, so steps since the last checkpoint may have used"
                f" either version: restore the file, then rerun with --resume, which continues from"
                f" {last or 'the start'}"
            )
        path = self.folder
        if accelerator.is_main_process:
            if not (self.folder / checkpoint.RECIPE_FILE).exists():
                self.display.log(f"{self.folder} was deleted during the run and is recreated without earlier metrics")
                self._write_recipe()
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            path = checkpoint.save_checkpoint(
                self.folder,
                self.global_step,
                accelerator.unwrap_model(self.model),
                self.recipe,
                self.built.qformer_tokenizer,
                {"optimizer": optimizer_state_by_name(self.optimizer, self.built.model), "scaler": scaler},
                {
                    "positions": [position for position, _ in gathered],
                    "counts": self.data_stats.metrics(),
                    "unfinished": pending_metrics,
                    "best_since": self.best_since,
                    "measured_with": self.measured_with,
                },
                self.recipe.training.save_total_limit,
            )
        accelerator.wait_for_everyone()
        return path


def derive_seed(seed: int, step: int, rank: int) -> int:
    """Return a seed below 2**32 for a step of a process; a negative `rank` is for seeds that all processes share."""
    return (seed * 1_000_003 + step * 10_007 + rank * 101) % 2**32
