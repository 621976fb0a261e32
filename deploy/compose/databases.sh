#!/bin/sh
# PostgreSQL runs this when its volume is new: a database and a role for each program, by a password
# of its own. psql takes it from the environment, since other users may read arguments.
set -eu
for program in AIRFLOW MLFLOW; do
    name="$(echo "$program" | tr '[:upper:]' '[:lower:]')"
    psql --set=ON_ERROR_STOP=1 --set=name="$name" --set=variable="${program}_DATABASE_PASSWORD" --username=postgres <<'SQL'
\getenv password :variable
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
REVOKE CONNECT ON DATABASE :"name" FROM PUBLIC;
SQL
done
