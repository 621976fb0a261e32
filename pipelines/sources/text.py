"""Text of what sources store as bytes."""

from __future__ import annotations


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
