"""A training run on one rank: set up, resume, step, log, save, stop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from cfld.codec import build_codec
from cfld.images import encode_png
from train.batch import Batch
from train.batches import BatchMaker, seed_layers
from train.checkpoint import Position, find_latest, open_checkpoint, save_checkpoint, share_out
from train.config import TrainConfig
from train.ema import Ema
from train.engine import deepspeed_settings, start_engine
from train.frozen import hash_frozen
from train.health import Heartbeat, SkipCounter, StopSignal, describe_pairs
from train.loader import Loader, load_pairs
from train.log import RunLog, StepMetrics, peak_memory_gib
from train.masters import Masters
from train.optimizer import build_optimizer, set_learning_rate
from train.pairs import PairTable, read_pairs
from train.pictures import draw_grid, spread_pairs
from train.processes import Ranks
from train.restore import check_frozen, load_state, load_weights, scaler_state
from train.schedule import learning_rate_factor
from train.weights import build_model

logger = logging.getLogger(__name__)

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What came of an optimizer step, the same on all ranks."""

    loss: float
    was_applied: bool
    gradient_norm: float
    data_wait_s: float
    must_stop: bool
    """Whether any rank was told to stop."""


class Trainer:
    """Everything that one rank holds during a run."""

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
            rank=ranks.rank,
            num_ranks=ranks.num_ranks,
        )
        self.num_steps = config.num_steps(self._loader.steps_per_epoch)
        self.step = 0
        self._skips = SkipCounter(config.health)
        checkpoint = ranks.broadcast(find_latest(self.run_folder) if ranks.is_first else None)
        torch.manual_seed(config.order.seed)
        model = build_model(config)
        self._frozen_sha256 = hash_frozen(model)
        dtype = _DTYPES.get(config.engine.precision, torch.float32)
        self._codec = build_codec(config.model.codec).to(ranks.device, dtype)
        if checkpoint:
            with open_checkpoint(checkpoint) as opened:
                check_frozen(opened, self._frozen_sha256)
                load_weights(model, opened)
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
        sizes = {
            name: getattr(parameter, "ds_numel", parameter.numel())
            for name, parameter in self._masters.parameters.items()
        }
        self._owned = share_out(sizes, ranks.num_ranks)[ranks.rank]
        if checkpoint:
            with open_checkpoint(checkpoint) as opened:
                self.step = opened.position.step
                load_state(opened, self._masters, self._engine, self._loader)
            logger.info("going on after step %d, from %s", self.step, checkpoint)
        self._saved_step = self.step if checkpoint else None
        self._ema = self._start_ema(checkpoint)
        channels_last = config.engine.channels_last
        self._maker = BatchMaker(
            config.model,
            self._codec,
            seed=config.order.seed,
            device=ranks.device,
            memory_format=torch.channels_last if channels_last else torch.contiguous_format,
        )
        self._pictured = self._load_pictured(table) if config.pictures.every_steps else None

    def run(self) -> bool:
        """Train to the end, or until told to stop; return whether the end was reached."""
        stop = StopSignal()
        heartbeat = Heartbeat(self.config.health, self._ranks)
        log = None
        if self._ranks.is_first:
            log = RunLog(self.run_folder, self.config.log, step=self.step, num_steps=self.num_steps)
        batches = iter(self._loader)
        try:
            self._engine.train()
            must_stop = False
            while self.step < self.num_steps and not must_stop:
                must_stop = self._advance(batches, log, stop).must_stop
            self._save()
        finally:
            batches.close()  # type: ignore[attr-defined]  # a generator: ends worker processes
            if log:
                log.close()
            stop.close()
        self._ranks.wait()
        heartbeat.close()
        is_done = self.step >= self.num_steps
        if not is_done:
            logger.info("stopped after step %d as told; the same command goes on", self.step)
        return is_done

    def _advance(
        self, batches: Iterator[Batch], log: RunLog | None, stop: StopSignal
    ) -> StepResult:
        """Do one optimizer step and all that is due after it."""
        began = time.perf_counter()
        rate = self.config.learning_rate * learning_rate_factor(
            self.config.schedule,
            self.step,
            steps_per_epoch=self._loader.steps_per_epoch,
            num_steps=self.num_steps,
        )
        set_learning_rate(self._engine.optimizer, rate)
        epoch = self.step // self._loader.steps_per_epoch
        result = self._train_step(batches, log, stop)
        self.step += 1
        if self._ema:
            self._ema.update(self.step)
        if log:
            elapsed_s = time.perf_counter() - began
            log.write(
                StepMetrics(
                    step=self.step,
                    epoch=epoch,
                    loss=result.loss,
                    learning_rate=rate,
                    gradient_norm=result.gradient_norm,
                    loss_scale=self._loss_scale(),
                    images_per_s=2 * self.config.order.global_batch / elapsed_s,
                    data_wait=result.data_wait_s / elapsed_s,
                    memory_gib=peak_memory_gib(self._ranks.device),
                    skipped=self._skips.total,
                )
            )
        pictures = self.config.pictures.every_steps
        if pictures and (self.step % pictures == 0 or self.step == self.num_steps):
            self._draw(log)
        if self.step % self.config.checkpoint.every_steps == 0:
            self._save()
        return result

    def _train_step(
        self, batches: Iterator[Batch], log: RunLog | None, stop: StopSignal
    ) -> StepResult:
        """Train on one global batch."""
        seen: list[tuple[Batch, Tensor]] = []
        data_wait_s, norm = 0.0, None
        for number in range(self._loader.accumulation):
            began = time.perf_counter()
            batch = next(batches)
            data_wait_s += time.perf_counter() - began
            seed_layers(self.config.order.seed, batch)
            with torch.autocast(
                self._ranks.device.type,
                torch.bfloat16,
                enabled=self.config.engine.precision == "autocast",
            ):
                losses = self._engine(self._maker.make(batch))
            self._engine.backward(losses.mean)
            seen.append((batch, losses.rows))
            if self.config.engine.is_plain and number == self._loader.accumulation - 1:
                norm = self._clip_gradients()
            self._engine.step()
        rows = torch.stack([rows for _, rows in seen])
        total = torch.stack(
            [rows.sum(), (~rows.isfinite()).sum(), rows.new_tensor(float(stop.is_set))]
        )
        dist.all_reduce(total)
        loss_sum, num_bad, num_stops = total.tolist()
        if norm is None:
            was_applied = bool(self._engine.was_step_applied())
            norm = float(self._engine.get_global_grad_norm() or 0.0)
        else:
            was_applied = math.isfinite(norm)
        if not was_applied:
            self._report_skipped(seen, has_bad_rows=num_bad > 0, log=log)
        self._skips.count(self.step + 1, was_applied)
        return StepResult(
            loss=loss_sum / (2 * self.config.order.global_batch),
            was_applied=was_applied,
            gradient_norm=norm,
            data_wait_s=data_wait_s,
            must_stop=num_stops > 0,
        )

    def _clip_gradients(self) -> float:
        """Clip the gradients, or drop them so that the step changes nothing; return their norm."""
        parameters = list(self._masters.parameters.values())
        limit = self.config.optimizer.clip_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit).item()
        if not math.isfinite(norm):
            for parameter in parameters:
                parameter.grad = None
        return norm

    def _report_skipped(
        self, seen: list[tuple[Batch, Tensor]], *, has_bad_rows: bool, log: RunLog | None
    ) -> None:
        """Name the pairs whose loss is not finite, or else all that the gradients are of."""
        keys: list[tuple[str, str]] = []
        for batch, rows in seen:
            is_bad = ~rows.isfinite().view(2, -1).all(dim=0).cpu()
            chosen = batch.draws[is_bad] if has_bad_rows else batch.draws
            keys += self._loader.pair_keys(chosen)
        pairs = [pair for of_rank in self._ranks.gather(keys) for pair in of_rank]
        what = "loss" if has_bad_rows else "gradients"
        reason = f"{what} not finite at loss scale {self._loss_scale():g}"
        logger.warning(
            "step %d skipped: %s; pairs %s", self.step + 1, reason, describe_pairs(pairs)
        )
        if log:
            log.write_skipped(self.step + 1, reason, pairs)

    def _save(self) -> None:
        """Write a checkpoint, unless this step has one; collective."""
        if self._saved_step == self.step:
            return
        position = Position(
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
            position,
            self._masters,
            self._ranks,
            self._owned,
            ema=self._ema.weights if self._ema else {},
            keep=self.config.checkpoint.keep,
        )
        self._saved_step = self.step

    def _start_ema(self, checkpoint: Path | None) -> Ema | None:
        if self.config.ema.decay is None:
            return None
        ema = Ema(self.config.ema, self._masters, self._owned)
        if checkpoint:
            with open_checkpoint(checkpoint) as opened:
                if opened.position.has_ema:
                    ema.load(opened)
        return ema

    def _load_pictured(self, table: PairTable) -> Batch:
        if self.config.validation:
            table = read_pairs([self.config.validation])
        pairs = spread_pairs(len(table.source), self.config.pictures.num_pairs)
        return load_pairs(table, self.config.loader, pairs)

    def _draw(self, log: RunLog | None) -> None:
        assert self._pictured is not None
        grid = draw_grid(self._engine, self._codec, self._pictured, self.config.pictures)
        if log:
            folder = self.run_folder / "pictures"
            folder.mkdir(exist_ok=True)
            (folder / f"step-{self.step:08d}.png").write_bytes(encode_png(grid))
            log.write_picture(self.step, grid)

    def _loss_scale(self) -> float:
        return float(scaler_state(self._engine).get("cur_scale", 1.0))
