"""What PostgreSQL of the compose file runs at its first start, in a real PostgreSQL."""

from __future__ import annotations

import hashlib
import hmac
import os
import subprocess
from base64 import b64decode
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from tests.integration.databases import run_postgres

SCRIPT = Path(__file__).resolve().parents[2] / "deploy/compose/databases.sh"
PASSWORDS = {"airflow": "it's $one's", "mlflow": "another"}

pytestmark = pytest.mark.integration


def is_password(kept: str, password: str) -> bool:
    """Whether PostgreSQL keeps this password (RFC 5803)."""
    _, salt, keys = kept.split("$")
    rounds, seasoning = salt.split(":")
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), b64decode(seasoning), int(rounds))
    key = hmac.digest(salted, b"Client Key", "sha256")
    return hashlib.sha256(key).digest() == b64decode(keys.split(":")[0])


def test_each_program_has_a_database_and_a_password_of_its_own() -> None:
    with run_postgres() as server:
        url = make_url(server.url)
        engine = create_engine(url)
        with engine.begin() as connection:
            connection.execute(text("CREATE ROLE postgres LOGIN SUPERUSER"))
        given = {f"{name.upper()}_DATABASE_PASSWORD": word for name, word in PASSWORDS.items()}
        place = {"PGHOST": str(url.host), "PGPORT": str(url.port), "PGDATABASE": "postgres"}
        subprocess.run(["sh", str(SCRIPT)], env=os.environ | place | given, check=True)
        with engine.connect() as connection:
            found = connection.execute(
                text("SELECT rolname, rolpassword, rolsuper FROM pg_authid WHERE rolcanlogin")
            )
            roles = {name: (kept, above) for name, kept, above in found}
            for name, password in PASSWORDS.items():
                (other,) = PASSWORDS.keys() - {name}
                kept, above = roles[name]
                assert is_password(kept, password)
                assert not is_password(kept, PASSWORDS[other])
                assert not above
                for database, may in ((name, True), (other, False)):
                    asked = text("SELECT has_database_privilege(:role, :database, 'CONNECT')")
                    told = connection.execute(asked, {"role": name, "database": database})
                    assert told.scalar() is may
        engine.dispose()
