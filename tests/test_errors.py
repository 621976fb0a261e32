from __future__ import annotations

import pytest

from pipelines.errors import UserError, require


def test_a_missing_package_is_named_with_what_to_do() -> None:
    require("json")
    with pytest.raises(UserError, match=r"^nowhere_to_be_found is not installed; run: make setup$"):
        require("nowhere_to_be_found")
