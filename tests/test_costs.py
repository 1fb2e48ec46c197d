"""Costs: every open meter sees every pass, and only while it is open."""

from __future__ import annotations

import json
import threading
import time

import pytest

from stitchvm.core.costs import CostMeter, count


def test_meters_nest():
    with CostMeter() as outer:
        count("denoiser", 2)
        with CostMeter() as inner:
            count("denoiser", 3)
            count("decoder", 1)
        count("head", 5)
    count("denoiser", 100)
    assert inner.passes == {"denoiser": 3, "decoder": 1}
    assert outer.passes == {"denoiser": 5, "decoder": 1, "head": 5}


def test_a_meter_used_again_adds_up():
    meter = CostMeter()
    for _ in range(2):
        with meter:
            count("tail", 4)
            time.sleep(0.01)
    assert meter.passes["tail"] == 8
    assert meter.seconds >= 0.02


def test_a_failure_closes_the_meter():
    meter = CostMeter()
    with pytest.raises(ValueError, match="unknown kind"), meter:
        count("no kind", 1)
    count("tail", 1)
    assert not meter.passes


def test_another_thread_is_not_counted():
    with CostMeter() as meter:
        thread = threading.Thread(target=count, args=("reward", 7))
        thread.start()
        thread.join()
        count("reward", 1)
    assert meter.passes["reward"] == 1


def test_an_unknown_kind_is_refused():
    with CostMeter() as meter, pytest.raises(ValueError, match="choose one of denoiser"):
        count("denoising", 1)
    assert not meter.passes


def test_the_report_is_json_and_names_only_what_ran():
    with CostMeter() as meter:
        count("decoder", 3)
    report = json.loads(json.dumps(meter.report()))
    assert set(report) == {"decoder", "seconds", "peak_memory"}
    assert report["decoder"] == 3 and report["peak_memory"] > 1e6
