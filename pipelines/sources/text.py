"""Text of what sources store as bytes, numbers and times."""

from __future__ import annotations

from decimal import Decimal
from typing import Any


def decode_bytes(value: bytes) -> str:
    """Return bytes as the UTF-8 text that they are, else as hexadecimal digits.

    Zeros at the end, with which databases fill columns of a fixed width, are no part of text;
    other zeros are in no text. Different bytes of one width stay different, so that ids do.
    """
    try:
        text = value.rstrip(b"\0").decode()
    except UnicodeDecodeError:
        return value.hex()
    return value.hex() if "\0" in text else text


def to_text(value: Any) -> str | None:
    """Return a value as text that tells it from others; None where it is no number."""
    if isinstance(value, bytes):
        return decode_bytes(value)
    if isinstance(value, float) and value.is_integer():
        return f"{value:.0f}"  # an id
    if isinstance(value, Decimal):
        if value.is_nan():
            return None
        digits = f"{value:f}"
        return digits.rstrip("0").rstrip(".") if "." in digits else digits
    return str(value)
