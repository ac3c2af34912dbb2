"""One training loop for every stage.

The loop does not know the objective: a stage gives back a dict of named losses, and the loop weights, sums, logs and
steps. Started again it goes on exactly where its last checkpoint was: the position in the data is kept, and all
randomness of a step is seeded: dropout from (seed, step, process), hard negatives from (seed, step) alone, so that
without dropout the same global batch gives the same step, whatever the number of processes.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import nn

from blip2 import checkpoint
from blip2.builder import build, prepare_texts, with_absolute_paths
from blip2.checkpoint import start_from
from blip2.config import Recipe
from blip2.console import Display
from blip2.data.assets import resolve
from blip2.data.collate import StageBatch
from blip2.data.dataset import Loaded, Preparation, plan_evaluation, to_device
from blip2.data.mixtures import Preparations, go_on, mix, plan_mixture
from blip2.data.overlap import Source, check_overlap
from blip2.data.records import Records, RecordStream, open_records
from blip2.data.workers import load
from blip2.distributed import gather_objects
from blip2.errors import InputError
from blip2.model.generation import GenerationBatch, GenerationModel
from blip2.model.losses import Outcome
from blip2.recipe import dump_recipe
from blip2.training.data_stats import Tally
from blip2.training.features import cached_features, summary
from blip2.training.interruption import Interruption, note_signals
from blip2.training.launch import deterministic, holding, make_accelerator, naming_failures
from blip2.training.metrics import METRICS, SKIPPED, StepFile, note
from blip2.training.monitor import FrozenFiles, Watch
from blip2.training.optimizer import (
    build_optimizer,
    describe,
    named_state,
    restore_optimizer,
    set_rates,
    set_schedule,
)  # fmt: skip
from blip2.training.projection import fit_projection
from blip2.training.resuming import compare_recipes
from blip2.training.sharding import checkpoint_activations, leave_frozen, place_trained, shard_frozen
from blip2.training.traffic import step_traffic
from blip2.training.validation import Evaluation, best_so_far, evaluate, is_better, validate

BROKEN_IN_A_ROW = 10
"""So many batches without a single good image stop a run."""
FITTED_IMAGES = 768
"""Images that the projection is fitted to."""
COLLAPSED = 0.95
"""Mean cosine between the output queries of an image above which they count as one vector."""
COLLAPSE_STEPS = 50
"""Steps before that is looked at: queries that have not learned anything yet are alike."""


def train(recipe: Recipe, resume: bool = False, evaluation: Callable[[Recipe], Evaluation] | None = None) -> Path:
    """Train one stage.

    Under ``torchrun`` or ``accelerate launch`` each process trains on its own batches of ``data.batch_size``.

    Args:
        resume: go on from the last checkpoint in ``recipe.output``, if there is one.
        evaluation: makes what evaluates the model as ``recipe.evaluation`` says, as in
        :mod:`blip2.evaluation.in_training`.

    Returns:
        The folder of the last checkpoint.

    Raises:
        InputError: the recipe asks for something that is not there or does not fit, the data is unusable, the disk is
            full, or the loss is no longer finite. Earlier checkpoints stay.
        Interruption: after SIGTERM, SIGINT or SIGHUP, with a checkpoint of the step that was under way.
    """
    recipe = with_absolute_paths(recipe)
    run = Path(recipe.output)
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output {run} cannot be made a folder ({error.strerror}): give another output") from error
    if recipe.evaluation is not None and evaluation is None:
        raise InputError("the recipe has an evaluation: train with blip2.evaluation.in_training.train, or leave it out")
    accelerator = make_accelerator(recipe)
    display = Display(run.name, enabled=accelerator.is_main_process)
    try:
        with holding(run):
            last = checkpoint.latest(run)
            if last is not None and not resume:
                raise InputError(
                    f"{run} already holds a run (its last checkpoint is {last.name}): go on with --resume, or give"
                    " another output"
                )
            with naming_failures(run), deterministic(recipe.training.full_determinism):
                return _Training(recipe, accelerator, display, last, evaluation).run()
    except OSError as error:
        if checkpoint.is_full(error):
            raise checkpoint.no_room(run, f"writing to {run}") from error
        if error.filename is None or not Path(str(error.filename)).absolute().is_relative_to(run):
            raise
        raise InputError(
            f"{error.filename} cannot be written or read ({error.strerror}): put that right and go on with --resume"
        ) from error
    finally:
        display.close()
        accelerator.end_training()
        # Otherwise the next run of this process could not have another precision.
        AcceleratorState._reset_state(reset_partial_state=True)  # pyright: ignore[reportPrivateUsage]


class _Training:
    """What one call of :func:`train` holds together."""

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        display: Display,
        last: Path | None,
        evaluation: Callable[[Recipe], Evaluation] | None,
    ) -> None:
        self.recipe, self.accelerator, self.display = recipe, accelerator, display
        self.folder = Path(recipe.output)
        self.watch = Watch(accelerator.device)
        state = optimizer_state = None
        if last is not None:
            state, optimizer_state = checkpoint.read_state(last)
            display.say(f"going on from {last}")
        self.step: int = state["step"] if state else 0

        self.new_projection = last is None
        set_seed(recipe.training.seed)
        going_on = None if last is None else checkpoint.open_own(last)
        if going_on is not None and recipe.vision.position_encoding == "auto":
            # What was tested at the first start is kept: another machine must not decide otherwise.
            found = going_on.recipe.vision.position_encoding
            recipe = replace(recipe, vision=replace(recipe.vision, position_encoding=found))
        for line in compare_recipes(going_on, recipe) if going_on is not None else ():
            display.say(line)
        shards = recipe.training.shard_frozen and accelerator.num_processes > 1
        names = [recipe.vision.name, *([recipe.language.name] if recipe.language else [])]
        self.frozen_files = FrozenFiles(resolve(name) for name in names)
        built = build(recipe, accelerator.device, going_on, torch.device("cpu") if shards else None)
        self.built = built
        vision = replace(recipe.vision, position_encoding=built.model.vision.position_encoding)
        self.recipe = recipe = replace(recipe, vision=vision)
        rates = set_rates(built.model, recipe.optimizer)
        if going_on is not None:
            for line in checkpoint.resume_weights(going_on, built.model):
                display.say(line)
        elif recipe.starts:
            self.new_projection = start_from(recipe, built, display.say)
        if accelerator.is_main_process:
            display.table(
                f"stage: {recipe.stage}", ["part", "parameters", "state", "dtype"], describe(built.model, rates)
            )
        if recipe.vision.drop_path_rate:
            if built.model.vision.is_frozen:
                raise InputError(
                    f"vision.drop_path_rate is {recipe.vision.drop_path_rate}, but optimizer.learning_rate freezes"
                    " the image encoder: set"
                    ' it to 0, or give "vision.*" a rate'
                )
            built.model.vision.drop_path(recipe.vision.drop_path_rate)
        if recipe.training.gradient_checkpointing:
            for line in checkpoint_activations(built.model):
                display.say(line)
        if recipe.training.torch_compile:
            built.model.qformer.compile_blocks()
            if built.model.vision.is_frozen and not shards:
                built.model.vision.compile_network()
        parts = {"vision": "features", "language": "states"} if recipe.language else {"vision": "features"}
        if shards and recipe.data.cached_views:
            parts.pop("vision")  # it runs before training, over as many pictures as each process has
            built.model.vision.to(accelerator.device)
        positions = state["positions"] if state else []
        self.opened: list[Source] = []
        self.loaded, self.validation = self._open_data(positions)
        language = recipe.language
        if language is not None and language.projection_init == "least_squares" and self.new_projection:
            self._fit_projection()
        self.evaluation: Evaluation | None = None
        if recipe.evaluation is not None and evaluation is not None:
            with accelerator.main_process_first():
                self.evaluation = evaluation(recipe)
            self.opened.append(("evaluation.data", recipe.evaluation.data, self.evaluation.records))
        if not recipe.data.allow_overlap:
            train = [source for source in self.opened if source[0] == "data.train"]
            for line in check_overlap(train, [source for source in self.opened if source not in train]):
                display.say(line)
        self.unfinished: dict[str, float] | None = state.get("unfinished") if state else None
        """Metrics of a step whose evaluation was under way when the run was killed."""
        self.best: float | None = None
        self.collapse_said = False

        leave_frozen(built.model)
        if shards:
            place_trained(built.model, accelerator.device)
        self.model: nn.Module
        self.model, self.optimizer = accelerator.prepare(
            built.model, build_optimizer(built.model, rates, recipe.optimizer), device_placement=[not shards, True]
        )
        if shards:
            sharded = shard_frozen(built.model, parts, accelerator.device)
            display.say(f"{sharded:,} frozen weights are dealt out to the processes of each machine")
        self.shards = shards
        if accelerator.num_processes > 1:
            trained = sum(parameter.numel() for parameter in built.model.parameters() if parameter.requires_grad)
            travels = step_traffic(
                recipe, trained, built.model.vision.tokens, built.model.vision.width, recipe.data.max_length,
                accelerator.num_processes,
            )  # fmt: skip
            sent = sum(travel.sent(accelerator.num_processes) for travel in travels)
            display.say(f"a process sends at most {sent / 1e6:,.1f} MB to the others in a step")
        if optimizer_state is not None:
            for line in restore_optimizer(self.optimizer, built.model, optimizer_state["optimizer"]):
                display.say(line)
            if accelerator.scaler is not None and optimizer_state["scaler"]:
                accelerator.scaler.load_state_dict(optimizer_state["scaler"])
        self.tally = Tally(list(recipe.data.sources), state["counts"] if state else None)

    # -- data --------------------------------------------------------------------------------------------------------

    def _open_data(self, positions: list[Any]) -> tuple[Iterator[Loaded], Preparation | None]:
        recipe, data = self.recipe, self.recipe.data
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        texts = prepare_texts(recipe, self.built)
        encoder = self.built.model.vision

        def prepare(source: str, train: bool) -> tuple[Records | RecordStream, Preparation]:
            with self.accelerator.main_process_first():
                records = open_records(resolve(source), data, process, processes)
            self.opened.append(("data.train" if train else "data.validation", source, records))
            features = None
            if data.cached_views:
                views = data.cached_views if train else 1
                features = cached_features(recipe, records, encoder, views, self.accelerator.device)
                self.display.say(f"features of {source}: {summary(features)}")
            preparation = Preparation(
                records, texts, encoder.preprocessing, train, data.min_crop_scale, data.horizontal_flip, features
            )
            return records, preparation

        opened, preparations = zip(*(prepare(source, train=True) for source in data.sources), strict=True)
        if data.group_column is not None and all(isinstance(o, Records) and o.groups is None for o in opened):
            raise InputError(
                f"data.group_column is {data.group_column}, which no source of data.train has: name a column of a"
                " table of captions, or leave it out"
            )
        self.preparations = preparations
        sources = mix(data.sources, opened, data.temperature)
        if len(sources) > 1:
            rows = [(source.name, f"{100 * source.share:.3g} %") for source in sources]
            self.display.table("data.train", ["source", "share of the steps"], rows)
        dealing = (
            data.batch_size, recipe.training.seed, data.group_by_length, process, processes,
            recipe.training.gradient_accumulation_steps
        )  # fmt: skip
        position = None
        if positions:
            position, lines = go_on(positions, sources, *dealing)
            for line in lines:
                self.display.say(line)
        plans = plan_mixture(sources, *dealing, position)
        validation = None
        if data.validation is not None:
            held_out, validation = prepare(data.validation, train=False)
            if not isinstance(held_out, Records):
                raise InputError("data.validation is a stream, expected a table or folder: set data.streaming to false")
        return load(plans, Preparations(preparations), data.num_workers), validation

    def _fit_projection(self) -> None:
        """Start the projection of stage 2 from the data, as ``language.projection_init`` says."""
        model = self.built.model
        assert isinstance(model, GenerationModel)
        preparation = next((each for each in self.preparations if each.records is not None), None)
        if preparation is None or preparation.records is None:
            raise InputError(
                "language.projection_init is least_squares, which needs a table among data.train, and there are only"
                " streams: set it to random"
            )
        plain = copy.copy(preparation)
        plain.train = False
        plans = plan_evaluation(preparation.records, self.recipe.data.batch_size)
        some = islice(plans, math.ceil(FITTED_IMAGES / self.recipe.data.batch_size))
        loaded = (each.batch for each in load(some, plain, 0) if isinstance(each.batch, GenerationBatch))
        device = model.image_norm.weight.device
        explained = fit_projection(model, (to_device(batch, device) for batch in loaded))
        self.display.say(
            f"the projection starts by least squares, which explains {100 * explained:.1f} % of the captions' tokens"
        )

    def _next(self) -> tuple[Loaded, StageBatch]:
        for _ in range(BROKEN_IN_A_ROW):
            started = time.monotonic()
            loaded = next(self.loaded)
            self.watch.waited += time.monotonic() - started
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
        total = recipe.training.max_steps
        if accelerator.is_main_process:
            self._write_recipe()
            # The line of a step whose evaluation is not done is yet to be written.
            StepFile.truncate(self.folder / METRICS, self.step - (self.unfinished is not None))
            StepFile.truncate(self.folder / SKIPPED, self.step)
            self.best = best_so_far(self.folder, recipe.training.metric_for_best_model)
        if recipe.training.report_to:
            accelerator.init_trackers("blip2", config={"recipe": dump_recipe(recipe)})
        saved = checkpoint.latest(self.folder)
        self.display.start(total, self.step)
        files = [StepFile(self.folder / name, enabled=accelerator.is_main_process) for name in (METRICS, SKIPPED)]
        with note_signals() as asked, contextlib.closing(files[0]) as metrics, contextlib.closing(files[1]) as skipped:
            if self.unfinished is not None:
                self._finish(self.unfinished, metrics)
            while self.step < total:
                started = time.monotonic()
                values, pairs = self._step()
                self.step += 1
                seconds = time.monotonic() - started
                values |= {"images_per_second": pairs / seconds, "seconds": seconds}
                self.tally.report(self.step, skipped, self.display, recipe.data.max_length)
                if self.validation is not None and (self.step % recipe.training.eval_steps == 0 or self.step == total):
                    values |= validate(
                        self.built.model, self.validation, recipe, accelerator, self.display.say,
                        self.last_batch if self.shards else None,
                    )  # fmt: skip
                self._warn_of_collapse(values)
                seen, stop = self.watch.look(bool(asked), seconds)
                values |= seen
                # What takes long, or what the best is chosen by, is of a checkpoint: a kill costs nothing of it.
                measured = self._evaluates or recipe.training.metric_for_best_model in values
                if measured:
                    saved = self._save(values)
                self._finish(values, metrics)
                self.tally.check(recipe.data.max_bad_fraction, skipped.path)
                self.display.advance(self.step, note(values))
                if not measured and (self.step % recipe.training.save_steps == 0 or self.step == total or stop):
                    saved = self._save()
                if stop and self.step < total:
                    raise Interruption(
                        f"stopped at step {self.step} of {total}; its checkpoint is {saved}; go on with --resume"
                    )
        if self.tally.skipped or self.tally.cut:
            self.display.say(f"{self.tally.skipped} records skipped, {self.tally.cut} captions cut")
        assert saved is not None
        return saved

    def _write_recipe(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "recipe.yaml").write_text(dump_recipe(self.recipe), encoding="utf-8")

    def _warn_of_collapse(self, values: dict[str, float]) -> None:
        """Say once that the queries have become one vector."""
        similarity = values.get("query_similarity", 0.0)
        if similarity <= COLLAPSED or self.step < COLLAPSE_STEPS or self.collapse_said:
            return
        self.collapse_said = True
        self.display.say(
            f"the queries have collapsed: at step {self.step} the mean cosine between those of an image is"
            f" {similarity:.3f}, so that {self.recipe.qformer.num_query_tokens} queries say no more than one; raise"
            f" objectives.query_diversity, which is {self.recipe.objectives.query_diversity:g}, and start again"
            " (docs/troubleshooting.md)"
        )

    @property
    def _evaluates(self) -> bool:
        """Whether an evaluation follows this step."""
        config = self.recipe.evaluation
        return config is not None and (
            self.step % config.eval_steps == 0 or self.step == self.recipe.training.max_steps
        )

    def _finish(self, values: dict[str, float], metrics: StepFile) -> None:
        """Evaluate where that is due, keep the best checkpoint, and write down what was measured of a step."""
        if self._evaluates and self.evaluation is not None:
            values |= evaluate(self.evaluation, self.built, self.step, self.recipe, self.display)
        name = self.recipe.training.metric_for_best_model
        if name in values:
            if self.accelerator.is_main_process and is_better(values[name], self.best, name):
                checkpoint.keep_best(self.folder, self.step, {"metric": name, "value": values[name]})
                self.best = values[name]
                self.display.say(f"step {self.step} is the best so far: {name} {values[name]:.4f}")
            self.accelerator.wait_for_everyone()
        metrics.write({"step": self.step, **values, **self.tally.metrics()})
        if self.recipe.training.report_to:
            of = self.tally.step_source  # a curve for each source
            self.accelerator.log({**values, **({f"loss/{of}": values["loss"]} if of else {})}, step=self.step)

    def _step(self) -> tuple[dict[str, float], int]:
        """One optimizer step; its metrics, and how many pairs all processes saw."""
        recipe, accelerator = self.recipe, self.accelerator
        set_seed(_mix(recipe.training.seed, self.step, accelerator.process_index))
        share = set_schedule(self.optimizer, self.step, recipe.training.max_steps, recipe.optimizer)
        taken = [self._next() for _ in range(recipe.training.gradient_accumulation_steps)]
        self.positions = taken[-1][0].position
        batches = [batch for _, batch in taken]
        self.last_batch = batches[-1]

        # Labels a micro-batch has on average over all of the step, so that losses add up to one mean over all labels.
        labels = torch.tensor(float(sum(batch.label_count for batch in batches)), device=accelerator.device)
        label_count = float(self._reduce(labels, "mean")) / len(batches)

        self.optimizer.zero_grad()
        sums: dict[str, torch.Tensor] = {}
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                shared = _mix(recipe.training.seed, self.step, -1 - number)
                outcome: Outcome = self.model(batch, label_count, seed=shared)
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
        if recipe.optimizer.max_grad_norm is not None:
            total = accelerator.clip_grad_norm_(self.model.parameters(), recipe.optimizer.max_grad_norm)
            norm = float(cast(torch.Tensor, total))
            if accelerator.scaler is None:  # with one, an overflow only skips the step
                self._check_finite(norm, sums["loss"], taken, "gradient")
            values["gradient_norm"] = norm
        self.optimizer.step()
        values |= {"rate_share": share, "rate": max(group["lr"] for group in self.optimizer.param_groups)}
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
            f" is {last or 'none'}: lower optimizer.learning_rate, or train in fp32"
        )

    def _save(self, unfinished: dict[str, float] | None = None) -> Path:
        """Write a checkpoint of this step, of which something is yet to be measured where `unfinished` is given."""
        accelerator = self.accelerator
        gathered = gather_objects((self.positions, self.frozen_files.changed()))
        positions = [position for position, _ in gathered]
        changed = sorted({file for _, files in gathered for file in files})
        if changed:
            last = checkpoint.latest(self.folder)
            raise InputError(
                f"{changed[0]} was changed while this run reads it, so steps since the last checkpoint may be of either"
                f" file: put the old one back and go on with --resume from {last or 'the start'}"
            )
        path = self.folder
        if accelerator.is_main_process:
            if not (self.folder / "recipe.yaml").exists():
                self.display.say(
                    f"{self.folder} was deleted while the run trains, and is made again: metrics begin anew"
                )
                self._write_recipe()
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            path = checkpoint.save(
                self.folder,
                self.step,
                accelerator.unwrap_model(self.model),
                self.recipe,
                self.built.qformer_tokenizer,
                {"optimizer": named_state(self.optimizer, self.built.model), "scaler": scaler},
                {"positions": positions, "counts": self.tally.metrics(), "unfinished": unfinished},
                self.recipe.training.save_total_limit,
            )
        accelerator.wait_for_everyone()
        return path

    def _reduce(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
        """The sum or mean over all processes."""
        return cast(torch.Tensor, self.accelerator.reduce(tensor, how))


def _mix(seed: int, step: int, process: int) -> int:
    """One number below 2**32 for a step of a process; for what all processes share, the process is below 0."""
    return (seed * 1_000_003 + step * 10_007 + process * 101) % 2**32
