#!/bin/sh
# PostgreSQL runs this when its volume is new: a database and a role for each program.
set -eu
for name in airflow mlflow; do
    psql --set=ON_ERROR_STOP=1 --set=name="$name" --set=password="$POSTGRES_PASSWORD" --username=postgres <<'SQL'
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
SQL
done
