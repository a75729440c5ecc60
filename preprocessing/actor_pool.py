"""Runs blocks of rows on a pool of actors, each of which holds a network; only counts come back."""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.util.annotations import RayDeprecationWarning

_ANSWER_SCHEMA = pa.schema([("num_rows", pa.int64()), ("failure", pa.binary())])

# A dead actor is started again, wherever there is room, and its block given to another meanwhile.
# A photo that kills every actor it meets must not do so for ever.
_MAX_RESTARTS = 20
_MAX_TASK_RETRIES = 5


def run_actors(
    actor: type,
    arguments: tuple[Any, ...],
    blocks: Sequence[pa.Table],
    num_workers: int,
    advance: Callable[[int], object],
    *,
    use_gpus: bool,
) -> None:
    """Have each block processed by one of the actors, built as `actor(*arguments)`.

    There is one actor for each GPU, if there are any, else one for each worker. Blocks are
    answered by what `answer` returns: their numbers of rows go to `advance`, a failure is raised.
    """
    num_gpus = int(ray.cluster_resources().get("GPU", 0)) if use_gpus else 0
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it reports its plan at every start
    with warnings.catch_warnings():
        # Ray means to give these arguments names of their own; until it has, this is the way.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        warnings.simplefilter("ignore", DeprecationWarning)  # Ray warns of its own defaults
        done = ray.data.from_arrow(list(blocks)).map_batches(
            actor,
            fn_constructor_args=arguments,
            batch_size=None,  # a block
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=min(num_gpus or num_workers, len(blocks))),
            num_cpus=1,
            num_gpus=1 if num_gpus else None,
            max_restarts=_MAX_RESTARTS,
            max_task_retries=_MAX_TASK_RETRIES,
        )
    for batch in done.iter_batches(batch_size=None, batch_format="pyarrow"):
        for failure in batch["failure"].drop_null().to_pylist():
            raise pickle.loads(failure)
        advance(pc.sum(batch["num_rows"]).as_py())


def answer(
    process: Callable[[pa.Table], None],
    block: pa.Table,
    failures: tuple[type[Exception], ...],
) -> pa.Table:
    """Process a block in an actor; return its number of rows, or the failure.

    Raised in an actor, it would reach the job as some error of Ray.
    """
    failure = None
    try:
        process(block)
    except failures as error:
        failure = pickle.dumps(error)
    return pa.table([[block.num_rows], [failure]], schema=_ANSWER_SCHEMA)
