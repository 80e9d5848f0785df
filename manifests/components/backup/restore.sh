#!/bin/sh
# Makes the database that PGHOST, PGUSER, PGPASSWORD and PGDATABASE name what it was at the dump, the only one in the
# folder $1: all of it in one transaction, or nothing. Whoever still uses the database is waited for, a minute at most.
set -eu
set -- "$1" "$1"/*.dump
[ $# -eq 2 ] && [ -f "$2" ] || { echo "there must be exactly one *.dump in $1" >&2; exit 2; }
pg_restore --no-owner --no-privileges --file="$1/restore.sql" "$2"
PGOPTIONS="-c lock_timeout=60s" psql --quiet --no-psqlrc --single-transaction --set=ON_ERROR_STOP=1 --output=/dev/null \
  --command='DROP SCHEMA public CASCADE' --command='CREATE SCHEMA public' --file="$1/restore.sql"
echo "restored $PGDATABASE from ${2##*/}"
