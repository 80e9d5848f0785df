#!/bin/sh
# One consistent snapshot of the database that PGHOST, PGUSER, PGPASSWORD and PGDATABASE name, as a file in the folder $1.
set -eu
name="${2:-mlflow-$(date -u +%Y%m%dT%H%M%SZ).dump}"
pg_dump --format=custom --no-owner --no-privileges --file="$1/$name.part"
pg_restore --list "$1/$name.part" >/dev/null # one that cannot be read is no backup
mv "$1/$name.part" "$1/$name"
echo "dumped $PGDATABASE to $name, $(wc -c <"$1/$name") bytes"
