"""A training run on one rank: set up, go on, step, log, save, stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch

from cfld.codec import build_codec
from cfld.images import encode_png
from train.batch import Batch
from train.batch_maker import BatchMaker, check_latents
from train.checkpoint import Checkpoint, CheckpointState, find_latest, save_checkpoint, share_out
from train.config import TrainConfig
from train.ema import Ema
from train.engine import deepspeed_settings, start_engine
from train.health import Heartbeat, SkipCounter, StopSignal, describe_pairs
from train.loader import Loader, load_pairs
from train.log import RunLog, StepMetrics, peak_memory_gib
from train.masters import Masters
from train.optimizer import build_optimizer, set_learning_rate
from train.pair_table import PairTable, read_pairs
from train.pictures import generate_grid, spread_pairs
from train.processes import Ranks
from train.restore import check_frozen, load_state, load_weights, loss_scale, scaler_state
from train.schedule import learning_rate_factor
from train.step import Stepper, StepResult
from train.weights import build_model, hash_frozen

logger = logging.getLogger(__name__)

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Trainer:
    """Everything that one rank holds during a run. All public methods are collective."""

    def __init__(
        self, config: TrainConfig, ranks: Ranks, table: PairTable, *, extra: Path | None = None
    ) -> None:
        """Build all, and go to where the run's newest checkpoint is.

        Raises:
            ValueError: If settings, machine, checkpoint or shard sets do not fit together.
        """
        self.config = config
        self.run_folder = Path(config.output)
        self._ranks = ranks
        self._loader = Loader(
            table,
            config.order,
            config.loader,
            micro_batch=config.engine.micro_batch,
            image_size=config.model.image_size,
            pose_map_size=config.model.pose_map_size,
            rank=ranks.rank,
            num_ranks=ranks.num_ranks,
        )
        self.num_steps = config.num_steps(self._loader.steps_per_epoch)
        self.step = 0
        dtype = _DTYPES.get(config.engine.precision, torch.float32)
        codec = build_codec(config.model.codec)
        check_latents(self._loader, config.model, codec)
        self._codec = codec.to(ranks.device, dtype)
        newest = ranks.broadcast(find_latest(self.run_folder) if ranks.is_first else None)
        self._start_engine(Checkpoint(newest) if newest else None, extra)
        self._stepper = Stepper(
            config, ranks, self._engine, self._masters, self._loader, self._build_maker()
        )
        self._skips = SkipCounter(config.health)
        self._pictured = self._load_pictured(table)

    def run(self) -> bool:
        """Train to the end, or until told to stop; return whether the end was reached."""
        stop, log = StopSignal(), None
        heartbeat = Heartbeat(self.config.health, self._ranks)
        if self._ranks.is_first:
            log = RunLog(self.run_folder, self.config.log, step=self.step, num_steps=self.num_steps)
        try:
            # Closing the iterator ends its worker processes.
            with closing(iter(self._loader)) as batches:  # type: ignore[type-var]  # a generator
                self._engine.train()
                must_stop = False
                while self.step < self.num_steps and not must_stop:
                    must_stop = self._advance(batches, stop, log).must_stop
            self._save()
        finally:
            if log:
                log.close()
            stop.close()
        self._ranks.wait()
        heartbeat.close()
        is_done = self.step >= self.num_steps
        if not is_done:
            logger.info("stopped after step %d as told; the same command goes on", self.step)
        return is_done

    def _start_engine(self, checkpoint: Checkpoint | None, extra: Path | None) -> None:
        config = self.config
        torch.manual_seed(config.order.seed)
        model = build_model(config)
        self._frozen_sha256 = hash_frozen(model)
        if checkpoint:
            check_frozen(checkpoint, self._frozen_sha256)
            load_weights(model, checkpoint)
        settings = deepspeed_settings(
            config.engine,
            config.optimizer,
            global_batch=config.order.global_batch,
            accumulation=self._loader.accumulation,
            extra=extra,
        )
        optimizer = build_optimizer(model, config.optimizer)
        self._engine = start_engine(model, optimizer, config.engine, settings)
        self._masters = Masters(self._engine)
        self._owned = share_out(self._masters.sizes, self._ranks.num_ranks)[self._ranks.rank]
        self._saved_step = None
        if checkpoint:
            self.step = self._saved_step = checkpoint.state.step
            load_state(checkpoint, self._masters, self._engine, self._loader)
            logger.info("going on after step %d, from %s", self.step, checkpoint.folder)
        self._ema = self._start_ema(checkpoint)

    def _start_ema(self, checkpoint: Checkpoint | None) -> Ema | None:
        if self.config.ema.decay is None:
            return None
        ema = Ema(self.config.ema, self._masters, self._owned)
        if checkpoint and checkpoint.state.has_ema:
            ema.load(checkpoint)
        return ema

    def _build_maker(self) -> BatchMaker:
        channels_last = self.config.engine.channels_last
        return BatchMaker(
            self.config.model,
            self._codec,
            seed=self.config.order.seed,
            device=self._ranks.device,
            memory_format=torch.channels_last if channels_last else torch.contiguous_format,
        )

    def _load_pictured(self, table: PairTable) -> Batch | None:
        if not self.config.pictures.every_steps:
            return None
        if self.config.validation:
            table = read_pairs([self.config.validation])
        pairs = spread_pairs(len(table.source), self.config.pictures.num_pairs)
        return load_pairs(
            table,
            pairs,
            self.config.loader.cache,
            image_size=self.config.model.image_size,
            pose_map_size=self.config.model.pose_map_size,
        )

    def _advance(
        self, batches: Iterator[Batch], stop: StopSignal, log: RunLog | None
    ) -> StepResult:
        """Do one optimizer step and all that is due after it."""
        began = time.perf_counter()
        rate = self._learning_rate()
        set_learning_rate(self._engine.basic_optimizer, rate)
        result = self._stepper.train(batches, must_stop=stop.is_set)
        self.step += 1
        if self._ema:
            self._ema.update(self.step)
        if not result.was_applied:
            self._report_skipped(result, log)
        self._skips.count(self.step, result.was_applied)
        if log:
            log.write(self._metrics(result, rate, time.perf_counter() - began))
        every = self.config.pictures.every_steps
        if every and (self.step % every == 0 or self.step == self.num_steps):
            self._draw(log)
        if self.step % self.config.checkpoint.every_steps == 0:
            self._save()
        return result

    def _learning_rate(self) -> float:
        return self.config.learning_rate * learning_rate_factor(
            self.config.schedule,
            self.step,
            steps_per_epoch=self._loader.steps_per_epoch,
            num_steps=self.num_steps,
        )

    def _metrics(self, result: StepResult, rate: float, elapsed_s: float) -> StepMetrics:
        return StepMetrics(
            step=self.step,
            epoch=(self.step - 1) // self._loader.steps_per_epoch,
            loss=result.loss,
            learning_rate=rate,
            gradient_norm=result.gradient_norm,
            loss_scale=loss_scale(self._engine),
            images_per_s=2 * self.config.order.global_batch / elapsed_s,
            data_wait=result.data_wait_s / elapsed_s,
            memory_gib=peak_memory_gib(self._ranks.device),
            skipped=self._skips.total,
        )

    def _report_skipped(self, result: StepResult, log: RunLog | None) -> None:
        what = "loss" if result.has_bad_loss else "gradients"
        reason = f"{what} not finite, loss scale now {loss_scale(self._engine):g}"
        pairs = describe_pairs(result.bad_pairs)
        logger.warning("step %d skipped: %s; pairs %s", self.step, reason, pairs)
        if log:
            log.write_skipped(self.step, reason, result.bad_pairs)

    def _save(self) -> None:
        """Write a checkpoint, unless this step has one."""
        if self._saved_step == self.step:
            return
        state = CheckpointState(
            step=self.step,
            num_updates=self._masters.num_updates,
            loader=self._loader.state_dict(),
            scaler=scaler_state(self._engine),
            frozen_sha256=self._frozen_sha256,
            has_ema=self._ema is not None,
            num_files=self._ranks.num_ranks,
        )
        save_checkpoint(
            self.run_folder,
            state,
            self._masters,
            self._ranks,
            self._owned,
            ema=self._ema.weights if self._ema else {},
            keep=self.config.checkpoint.keep,
        )
        self._saved_step = self.step

    def _draw(self, log: RunLog | None) -> None:
        assert self._pictured is not None
        grid = generate_grid(self._engine, self._codec, self._pictured, self.config.pictures)
        if log:
            folder = self.run_folder / "pictures"
            folder.mkdir(exist_ok=True)
            (folder / f"step-{self.step:08d}.png").write_bytes(encode_png(grid))
            log.write_picture(self.step, grid)
