import errno
import json
import threading
import time

import numpy as np
import pytest
import toy_training as toy
from etils import epath
from tensorboardX import event_file_writer

from realm_retro.train import metrics
from realm_retro.train.metrics import Meter, MetricsLog

RECORD = {
    "step": 120,
    "loss": 3.4123,
    "accuracy": 0.51234,
    "grad_norm": 0.5,
    "learning_rate": 1.9e-3,
    "tokens": 120 * 96,
    "tokens_per_second": 9812.3,
    "seconds_per_step": 0.4168,
    "skipped": 0,
}


def make_meter(every=2, steps=5, bad=()):
    records = []
    meter = Meter(
        toy.make_recipe(),
        toy.mesh_of(1, 1, 1),
        toy.make_config(steps, log_every=every),
        judge=lambda step, values: {} if step in bad else values,
        report=records.append,
    )
    meter.start()
    return meter, records


def step_metrics(total=2.0, weight=1.0, grad=1.0, skipped=0):
    one = np.float32(1)
    return {
        "loss": (np.float32(total), np.float32(weight)),
        "grad_norm": (np.float32(grad), one),
        "learning_rate": (np.float32(0.5), one),
        "skipped": (np.float32(skipped), one),
    }


def test_a_record_is_the_mean_over_tokens():
    meter, records = make_meter()
    meter.add(1, step_metrics(total=10, weight=10))
    meter.add(2, step_metrics(total=6, weight=2, grad=2))
    assert [r["step"] for r in records] == [2]
    assert records[0]["loss"] == pytest.approx(16 / 12)
    assert records[0]["grad_norm"] == pytest.approx(1.5)
    assert records[0]["tokens"] == 2 * toy.ROWS * toy.LENGTH
    assert "mfu" not in records[0]  # no peak is known for a CPU


def test_the_last_step_ends_a_record_and_each_starts_anew():
    meter, records = make_meter(every=2, steps=3)
    for step, loss in ((1, 1.0), (2, 3.0), (3, 7.0)):
        meter.add(step, step_metrics(total=loss))
    assert [(r["step"], r["loss"]) for r in records] == [(2, 2.0), (3, 7.0)]


def test_no_targets_at_all_is_no_division_by_zero():
    meter, records = make_meter(every=1)
    meter.add(1, step_metrics(total=0, weight=0))
    assert records[0]["loss"] == 0


def test_steps_that_were_left_out_are_counted_and_have_no_part_in_the_mean():
    meter, records = make_meter(every=2, bad=(2,))
    meter.add(1, step_metrics(total=3))
    meter.add(2, step_metrics(total=np.nan, skipped=1))
    assert (records[0]["loss"], records[0]["skipped"]) == (3, 1)


def test_a_record_waits_for_a_step_that_counts():
    meter, records = make_meter(every=2, steps=6, bad=(1, 2, 5, 6))
    for step, skipped in enumerate((1, 2, 2, 2, 3, 4), 1):
        meter.add(step, step_metrics(total=step, skipped=skipped))
    assert [(r["step"], r["loss"], r["skipped"]) for r in records] == [(4, 3.5, 2)]


def test_line():
    assert metrics.format_line(RECORD, 300) == (
        "step 120/300  loss 3.412  accuracy 0.5123  lr 1.9e-03  grad 0.50"
        "  9,812 tok/s  417 ms/step  MFU –  left 1m15s"
    )
    assert "skipped 2  lr" in metrics.format_line({**RECORD, "skipped": 2}, 300)
    assert "MFU 41.3%" in metrics.format_line({**RECORD, "mfu": 0.4129}, 300)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0s"), (59.6, "1m00s"), (75, "1m15s"), (3599.9, "1h00m"), (7290, "2h01m")],
)
def test_seconds(seconds, text):
    assert metrics.format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("cpu", None),
    ],
)
def test_peaks(kind, tera):
    assert metrics.peak_flops(kind) == (tera and tera * 1e12)


def write(run_dir, steps, resumed_at=0):
    with MetricsLog(run_dir, resumed_at=resumed_at) as log:
        for step in steps:
            log.write({"step": step, "loss": 1.0 / step})


def steps_of(run_dir):
    lines = (run_dir / metrics.FILE).read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_records_beyond_the_checkpoint_are_forgotten(tmp_path):
    run_dir = epath.Path(tmp_path)
    write(run_dir, [1, 2, 3, 4])
    write(run_dir, [3, 4, 5], resumed_at=2)
    assert steps_of(run_dir) == [1, 2, 3, 4, 5]
    write(run_dir, [1], resumed_at=0)
    assert steps_of(run_dir) == [1]


TORN = ['{"step": 2, "lo', '{"step": 2}', '{"st\n', "7\n"]
FAR = f'{{"step": 1{"0" * 400}}}\n'  # no float is so large


@pytest.mark.parametrize("torn", [*TORN, FAR])
def test_a_torn_line_goes(tmp_path, torn):
    run_dir = epath.Path(tmp_path)
    write(run_dir, [1])
    with (tmp_path / metrics.FILE).open("a") as file:
        file.write(torn)
    write(run_dir, [3], resumed_at=2)
    assert steps_of(run_dir) == [1, 3]


def test_tensorboard_gets_each_value(tmp_path):
    write(epath.Path(tmp_path), [1, 2])
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.read_bytes().count(b"loss") == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_goes_on_when_its_thread_has_died(tmp_path, monkeypatch):
    """Of a disk that was full for a moment, between two records."""
    whole = event_file_writer.EventsWriter.write_event
    full, written = threading.Event(), []

    def write_event(writer, event):
        if full.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(writer, event)
        written.append(str(event))

    def until(reached):
        deadline = time.monotonic() + 30
        while not reached():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    monkeypatch.setattr(event_file_writer.EventsWriter, "write_event", write_event)
    with MetricsLog(epath.Path(tmp_path), resumed_at=0) as log:
        log.write({"step": 1, "first": 1.0})
        until(lambda: "first" in "".join(written))
        full.set()
        log.write({"step": 2, "lost": 1.0})
        until(lambda: not all(thread.is_alive() for thread in log._board_threads))
        full.clear()
        log.write({"step": 3, "third": 1.0})
    assert steps_of(tmp_path) == [1, 2, 3]
    events = sorted((tmp_path / "tensorboard").iterdir())
    found = b"".join(path.read_bytes() for path in events)
    assert (b"first" in found, b"third" in found) == (True, True)
