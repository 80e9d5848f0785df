"""Backups between a folder and BACKUP_URI, any URI of fsspec: `push FOLDER`, then the oldest but KEEP are removed; or
`fetch FOLDER [NAME]`, by default the newest."""

import os
import sys
from pathlib import Path

import fsspec


def main(command: str, folder: str, name: str = "") -> None:
    """Raises SystemExit with a line that says what is missing."""
    backup_uri = os.environ.get("BACKUP_URI", "")
    if not backup_uri:
        raise SystemExit("BACKUP_URI is not set: name a folder in a bucket, e.g. gs://bucket/mlflow-backups")
    files, root = fsspec.core.url_to_fs(backup_uri)
    files.makedirs(root, exist_ok=True)
    if command == "push":
        for path in sorted(Path(folder).glob("*.dump")):
            half = f"{root}/{path.name}.part"  # no kill leaves a half one under its name
            files.put_file(str(path), half)
            files.mv(half, f"{root}/{path.name}")
            print(f"saved {backup_uri}/{path.name}")
        known = names(files, root)
        for old in known[: max(len(known) - int(os.environ.get("KEEP", "30")), 0)]:
            files.rm_file(f"{root}/{old}")
            print(f"removed {backup_uri}/{old}")
    else:
        known = names(files, root)
        name = name or (known or [""])[-1]
        if not name or not files.exists(f"{root}/{name}"):
            shown = ", ".join(known[-5:]) or "none"
            raise SystemExit(f"there is no backup {name} in {backup_uri}; the newest there are: {shown}")
        files.get_file(f"{root}/{name}", str(Path(folder, name)))
        print(f"fetched {backup_uri}/{name}")


def names(files: fsspec.AbstractFileSystem, root: str) -> list[str]:
    """Of whole nightly backups, the oldest first: their names tell when they were taken."""
    found = (path.rpartition("/")[2] for path in files.ls(root, detail=False))
    return sorted(name for name in found if name.startswith("mlflow-") and name.endswith(".dump"))


if __name__ == "__main__":
    main(*sys.argv[1:])
