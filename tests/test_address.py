"""Addresses as they are shown."""

from __future__ import annotations

import pytest

from pipelines.address import hide_login


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql://u:pw@h/db", "postgresql://h/db"),
        ("postgresql://u:p/w@h:5432/db", "postgresql://h:5432/db"),
        ("postgresql://u:p@/w?x@h/db", "postgresql://h/db"),
        ("postgresql://u:1/2@h/db", "postgresql://h/db"),
        ("postgresql://u@h/db", "postgresql://h/db"),
        (
            "postgresql://h/db?user=joe&password=secret&sslmode=require",
            "postgresql://h/db?user=joe&password=***&sslmode=require",
        ),
        (
            "mysql://h/db?Passwd=a&db_pwd=b&api_key=c&token=d&x=1",
            "mysql://h/db?Passwd=***&db_pwd=***&api_key=***&token=***&x=1",
        ),
        ("https://me:p/w@shop/mlflow", "https://shop/mlflow"),
        ("https://shop/orders?auth=a&Signature=b", "https://shop/orders?auth=***&Signature=***"),
        # Nobody logs in here.
        ("http://shop:5000/team/@us", "http://shop:5000/team/@us"),
        ("https://shop/@us", "https://shop/@us"),
        ("sqlite:////home/me@shop/events.db", "sqlite:////home/me@shop/events.db"),
        ("http://mlflow:5000", "http://mlflow:5000"),
    ],
)
def test_who_connects_and_with_which_password_is_not_shown(address: str, shown: str) -> None:
    assert hide_login(address) == shown
