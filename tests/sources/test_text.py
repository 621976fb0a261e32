"""Bytes as text."""

from __future__ import annotations

import pytest

from pipelines.sources.text import decode_bytes


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"caf\xc3\xa9", "café"),
        (b"u1\0\0", "u1"),
        (b"\xff\x00\x41", "ff0041"),
        (b"\0\0\0\x07", "00000007"),
        (b"\0\0", ""),
        (b"", ""),
    ],
)
def test_bytes_are_text_or_digits(value: bytes, text: str) -> None:
    assert decode_bytes(value) == text


def test_bytes_of_one_width_stay_different() -> None:
    values = [bytes([a, b]) for a in range(256) for b in range(256)]
    assert len({decode_bytes(value) for value in values}) == len(values)
