from __future__ import annotations

import math

import pytest

from mil_cli.report import text


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0, "0"),
        (1, "1.00"),
        (0.12345, "0.123"),
        (-0.12345, "-0.123"),
        (999.9, "1000"),
        (123456, "123456"),
        (1234567, "1.23e+06"),
        (0.0000123, "1.23e-05"),
        (math.inf, "inf"),
    ],
)
def test_significant(value: float, written: str) -> None:
    assert text.significant(value) == written


@pytest.mark.parametrize(
    ("value", "written"),
    [(None, "-"), (0, "0"), (999, "999"), (515.4, "515"), (34_120_000, "34.1 M"), (1234, "1.23 k"), (2.5e12, "2.50 T")],
)
def test_count(value: float | None, written: str) -> None:
    assert text.count(value) == written


@pytest.mark.parametrize(
    ("value", "written"), [(None, "-"), (12, "12 B"), (98_234, "98.2 kB"), (4_323_000, "4.32 MB"), (2e9, "2.00 GB")]
)
def test_size(value: float | None, written: str) -> None:
    assert text.size(value) == written


@pytest.mark.parametrize(
    ("seconds", "written"), [(3.21, "3.2 s"), (250, "4 min 10 s"), (7500, "2 h 5 min"), (59.99, "60.0 s")]
)
def test_duration(seconds: float, written: str) -> None:
    assert text.duration(seconds) == written


def test_others() -> None:
    assert text.milliseconds(0.0931) == "0.0931 ms"
    assert text.milliseconds(1940.0) == "1940 ms"
    assert text.joules(0.0032) == "3.20 mJ"
    assert text.quality(0.93254) == "0.9325"
    assert text.quality(31.416) == "31.42"
    assert text.change(-0.0037) == "-0.0037"
    assert text.change(0.0105) == "+0.0105"
    assert text.percent(-0.005) == "-0.50 %"
    assert text.signed_percent(0.153) == "+15.3 %"
    assert text.times(4.1305) == "4.13x"
