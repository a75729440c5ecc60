"""Logs that go on where a checkpoint is, and never hold a step twice."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.log import METRICS_FILE, LogConfig, RunLog, StepMetrics, cut_lines


def metrics(step: int, loss: float = 0.5) -> StepMetrics:
    return StepMetrics(
        step=step, epoch=0, loss=loss, learning_rate=1e-3, gradient_norm=1.0, loss_scale=1.0,
        images_per_s=10.0, data_wait=0.01, memory_gib=1.0, skipped=0,
    )  # fmt: skip


def write(folder, first: int, last: int) -> None:
    log = RunLog(folder, LogConfig(every_steps=1), step=first, num_steps=10)
    for step in range(first + 1, last + 1):
        log.write(metrics(step, loss=step / first if first else float(step)))
        log.write_skipped(step, "loss not finite", [("a", "b")])
    log.close()


def test_a_log_that_goes_back_holds_every_step_once(tmp_path) -> None:
    write(tmp_path, 0, 6)
    write(tmp_path, 4, 8)
    for name in ("metrics.jsonl", "skipped.jsonl"):
        lines = [json.loads(line) for line in (tmp_path / name).open()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert lines[0]["pairs"] == [["a", "b"]]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert events[-1].value == 2.0


def test_what_is_not_finite_is_null(tmp_path) -> None:
    log = RunLog(tmp_path, LogConfig(tensorboard=False), step=0, num_steps=1)
    log.write(metrics(1, loss=float("nan")))
    log.close()
    assert json.loads((tmp_path / METRICS_FILE).read_text())["loss"] is None


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('{"step": 1}\n{"step": 2}\n', '{"step": 1}\n'),
        ('{"step": 1}\n{"ste', '{"step": 1}\n'),
        ("", ""),
    ],
)
def test_later_and_torn_lines_are_cut(tmp_path, text, kept) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    cut_lines(path, 1)
    assert path.read_text() == kept
