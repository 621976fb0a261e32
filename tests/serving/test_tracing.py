from __future__ import annotations

import re

import pytest

from pipelines.errors import UserError
from serving.tracing import plan_tracing


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ENDPOINT", "TRACES_ENDPOINT"):
        monkeypatch.delenv(f"OTEL_EXPORTER_OTLP_{name}", raising=False)
    monkeypatch.delenv("OTEL_TRACES_SAMPLER_ARG", raising=False)


def test_traces_are_off_without_a_collector() -> None:
    off = plan_tracing()
    assert off.keys() == {"excluded_urls"}
    for path in ("/predict", "/users/ann", "/"):
        assert re.search("|".join(off["excluded_urls"]), f"http://shop:3000{path}")


@pytest.mark.parametrize("name", ["ENDPOINT", "TRACES_ENDPOINT"])
def test_a_collector_switches_them_on(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{name}", "http://127.0.0.1:4318")
    assert plan_tracing()["sample_rate"] == 1.0
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.25")
    assert plan_tracing()["sample_rate"] == 0.25


@pytest.mark.parametrize("rate", ["2", "-1", "nan", "often"])
def test_a_share_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch, rate: str) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", rate)
    with pytest.raises(UserError, match="OTEL_TRACES_SAMPLER_ARG"):
        plan_tracing()


def test_addresses_of_a_shopper_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    excluded = re.compile("|".join(plan_tracing()["excluded_urls"]))
    for path in ("/users/ann", "/users/ann/prediction", "/users/predict/prediction", "/readyz"):
        assert excluded.search(f"http://shop:3000{path}"), path
    for path in ("/predict", "/users/predict", "/users/erase", "/events"):
        assert not excluded.search(f"http://shop:3000{path}"), path
