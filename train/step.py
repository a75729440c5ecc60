"""One optimizer step: a global batch through the engine, and what came of it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from train.batch import Batch
from train.batch_maker import BatchMaker
from train.config import TrainConfig
from train.engine import DeepSpeedEngine
from train.loader import Loader
from train.masters import Masters
from train.processes import Ranks

Seen = list[tuple[Batch, Float[Tensor, " rows"]]]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What came of an optimizer step, the same on all ranks but for `data_wait_s`."""

    loss: float
    """Mean over the global batch."""
    was_applied: bool
    """False if the loss or the gradients were not finite: then nothing changed."""
    bad_pairs: list[tuple[str, str]]
    """If it was not applied, the pairs whose loss is not finite, or else all of the batch."""
    has_bad_loss: bool
    gradient_norm: float
    data_wait_s: float
    must_stop: bool
    """Whether any rank was told to stop."""


class Stepper:
    """Trains on one global batch at a time."""

    def __init__(
        self,
        config: TrainConfig,
        ranks: Ranks,
        engine: DeepSpeedEngine,
        masters: Masters,
        loader: Loader,
        maker: BatchMaker,
    ) -> None:
        self._config = config
        self._ranks = ranks
        self._engine = engine
        self._masters = masters
        self._loader = loader
        self._maker = maker

    def train(self, batches: Iterator[Batch], *, must_stop: bool) -> StepResult:
        """Train on the next global batch; collective. `must_stop` is told to all ranks."""
        seen: Seen = []
        data_wait_s, norm = 0.0, None
        for number in range(self._loader.accumulation):
            began = time.perf_counter()
            batch = next(batches)
            data_wait_s += time.perf_counter() - began
            seen.append((batch, self._accumulate(batch)))
            if self._config.engine.is_plain and number == self._loader.accumulation - 1:
                norm = self._clip_gradients()
            self._engine.step()
        loss, num_bad, num_stops = self._totals(seen, must_stop=must_stop)
        if norm is None:
            was_applied = bool(self._engine.was_step_applied())
            norm = float(self._engine.get_global_grad_norm() or 0.0)
        else:
            was_applied = math.isfinite(norm)
        return StepResult(
            loss=loss,
            was_applied=was_applied,
            bad_pairs=[] if was_applied else self._bad_pairs(seen, has_bad_loss=num_bad > 0),
            has_bad_loss=num_bad > 0,
            gradient_norm=norm,
            data_wait_s=data_wait_s,
            must_stop=num_stops > 0,
        )

    def _accumulate(self, batch: Batch) -> Float[Tensor, " rows"]:
        """Add a micro-batch's gradients; return the loss of each row."""
        seed_layers(self._config.order.seed, batch)
        with torch.autocast(
            self._ranks.device.type,
            torch.bfloat16,
            enabled=self._config.engine.precision == "autocast",
        ):
            losses = self._engine(self._maker.make(batch))
        self._engine.backward(losses.mean)
        return losses.rows

    def _clip_gradients(self) -> float:
        """Clip the gradients, or drop them so that the step changes nothing; return their norm."""
        parameters = list(self._masters.parameters.values())
        limit = self._config.optimizer.clip_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit).item()
        if not math.isfinite(norm):
            for parameter in parameters:
                parameter.grad = None
        return norm

    def _totals(self, seen: Seen, *, must_stop: bool) -> tuple[float, int, int]:
        """Return the mean loss, the bad rows and the ranks told to stop, over all ranks."""
        rows = torch.stack([rows for _, rows in seen])
        is_bad = ~rows.isfinite()
        totals = torch.stack([rows.sum(), is_bad.sum(), rows.new_tensor(float(must_stop))])
        dist.all_reduce(totals)
        loss_sum, num_bad, num_stops = totals.tolist()
        return loss_sum / (2 * self._config.order.global_batch), int(num_bad), int(num_stops)

    def _bad_pairs(self, seen: Seen, *, has_bad_loss: bool) -> list[tuple[str, str]]:
        keys: list[tuple[str, str]] = []
        for batch, rows in seen:
            is_bad = ~rows.isfinite().view(2, -1).all(dim=0).cpu()
            keys += self._loader.pair_keys(batch.draws[is_bad] if has_bad_loss else batch.draws)
        return [pair for of_rank in self._ranks.gather(keys) for pair in of_rank]


def seed_layers(seed: int, batch: Batch) -> None:
    """Seed what layers draw by themselves (stochastic depth in S) by the batch they see.

    A resumed run draws the same again. These draws belong to a micro-batch, not to a pair: with
    `drop_path` the loss is exactly reproducible only for the same split into micro-batches.
    """
    key = np.random.SeedSequence((seed, int(batch.draws[0])))
    torch.manual_seed(int(key.generate_state(1)[0]))
