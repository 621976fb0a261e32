"""How many processes predict; what they do is tested with a real model in tests/integration."""

from __future__ import annotations

import os

import pytest

from serving.engine import COUNT_VARIABLE, find_count


@pytest.mark.parametrize(("cores", "count"), [(1, 1), (3, 3), (4, 4), (64, 4)])
def test_each_core_has_a_process_up_to_four(
    cores: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    for text in (None, ""):
        monkeypatch.delenv(COUNT_VARIABLE, raising=False)
        if text is not None:
            monkeypatch.setenv(COUNT_VARIABLE, text)
        assert find_count() == count


@pytest.mark.parametrize("text", ["1", "64"])
def test_as_many_processes_are_had_as_are_asked_for(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(COUNT_VARIABLE, text)
    assert find_count() == int(text)
