"""Tables, forecasts and lines of progress of a run."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from engine.errors import EngineError
from engine.training.log import COLUMNS, CsvLog
from engine.training.report import EvaluationReport, Progress, end_text, forecast_text

REPORT = EvaluationReport(
    iteration=7,
    samples=32,
    tokens=4096,
    sched=0.25,
    loss=3.5,
    validation_loss=None,
    gradient_norm=0.75,
    n_tokens=512,
    evaluation_ms=250.0,
    elapsed_ms=1500.0,
)


def lines(path):
    return path.read_text().splitlines()


def test_a_row_is_written_at_once(tmp_path):
    path = tmp_path / "log.csv"
    log = CsvLog(str(path), 0.004, 0)
    assert lines(path) == [",".join(COLUMNS)]
    log.add(REPORT)
    log.add(replace(REPORT, iteration=8, validation_loss=2.125))
    assert lines(path)[1:] == [
        "7,32,4096,0.001,3.5,,0.75,2048.0,1.500",
        "8,32,4096,0.001,3.5,2.125,0.75,2048.0,1.500",
    ]
    log.close()


def test_a_table_goes_on_before_the_iteration_of_the_checkpoint(tmp_path):
    path = tmp_path / "log.csv"
    log = CsvLog(str(path), 0.004, 0)
    for iteration in range(5):
        log.add(replace(REPORT, iteration=iteration, elapsed_ms=1000.0 * iteration))
    log.close()
    with path.open("a") as file:
        file.write("5,cut o")
    log = CsvLog(str(path), 0.004, 3)
    log.add(replace(REPORT, iteration=3, elapsed_ms=500.0))
    log.close()
    table = [line.split(",") for line in lines(path)]
    assert [row[0] for row in table] == ["iteration", "0", "1", "2", "3"]
    assert table[-1][-1] == "2.500"


def test_a_file_of_another_kind_is_begun_anew(tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(b"\xff\x00 iteration,loss\n1,2\n")
    CsvLog(str(path), 0.004, 3).close()
    assert lines(path) == [",".join(COLUMNS)]


def test_a_table_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(EngineError, match="no-such-folder"):
        CsvLog(str(tmp_path / "no-such-folder" / "log.csv"), 0.004, 0)


def test_the_end_is_a_time_of_today_or_a_date():
    now = time.mktime((2024, 6, 30, 14, 5, 0, 0, 0, -1))
    assert end_text(0, now) == "14:05"
    assert end_text(3_600_000, now) == "15:05"
    assert end_text(20 * 3_600_000, now) == "2024-07-01 10:05"


def test_a_forecast_is_of_the_whole_run():
    text = forecast_text(99, 9, 60_000.0, 600_000.0)
    assert text.startswith("the whole run of 99 iterations will take about 01:50:00, until ")


def test_progress_averages_the_last_ten():
    progress = Progress(100, 50)
    for i in range(30):
        report = replace(REPORT, iteration=100 + i, loss=float(i), evaluation_ms=500.0)
        text = progress.text(report)
    assert text == "iteration 129/150  1024 tokens/s  ETA 00:00:10  loss 24.5000"


def test_progress_without_a_tick_of_the_clock_tells_no_time():
    text = Progress(0, 5).text(replace(REPORT, iteration=0, evaluation_ms=0.0))
    assert text == "iteration 0/5  loss 3.5000"
