"""A stand-in for gcloud: records every call, plays scripted replies, and can be a host and a bucket.

Under FAKE (a folder): `calls.jsonl` gets one argument list a call. `replies.json` maps a piece of a command line to a
list of {"out", "err", "code"}, used up one a call, the last for ever. Without a reply, `tpu-vm ssh` runs its command
and `tpu-vm scp` copies, in FAKE/host as the home folder, and `storage` works on FAKE/bucket for gs://; anything else
succeeds in silence. If there is `meanwhile`, a bash script, `storage rsync` runs it between its files, with the name of
the folder and the number of files that are through.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from shutil import copyfile, rmtree

FAKE = Path(os.environ["FAKE"])


def scripted(line: str) -> dict | None:
    path = FAKE / "replies.json"
    replies = json.loads(path.read_text()) if path.exists() else {}
    for piece, queue in replies.items():
        if piece in line:
            reply = queue.pop(0) if len(queue) > 1 else queue[0]
            path.write_text(json.dumps(replies))
            return reply
    return None


def place(name: str) -> Path:
    return FAKE / "bucket" / name.removeprefix("gs://") if name.startswith("gs://") else Path(name)


def rsync(source: Path, target: Path, exclude: str) -> int:
    if not source.is_dir():
        sys.stderr.write(f"ERROR: {source} is no folder\n")
        return 1
    names = [path.relative_to(source) for path in sorted(source.rglob("*")) if path.is_file()]
    code = 0
    for number, name in enumerate(name for name in names if not (exclude and re.match(exclude, str(name)))):
        if (FAKE / "meanwhile").exists():
            subprocess.run(["bash", FAKE / "meanwhile", source.name, str(number)], check=True)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            copyfile(source / name, target / name)
        except FileNotFoundError as error:  # the others are copied all the same
            sys.stderr.write(f"ERROR: {error}\n")
            code = 1
    return code


def storage(verb: str, options: dict[str, str], names: list[str]) -> int:
    if verb == "rsync":
        return rsync(place(names[0]), place(names[1]), options.get("--exclude", ""))
    path = place(names[0])
    if not path.exists():
        sys.stderr.write("ERROR: (gcloud.storage) One or more URLs matched no objects.\n")
        return 1
    if verb == "rm":
        rmtree(path)
    elif path.is_dir():
        sys.stdout.writelines(f"{names[0]}{entry.name}/\n" for entry in sorted(path.iterdir()))
    return 0


def main(arguments: list[str]) -> int:
    with (FAKE / "calls.jsonl").open("a") as file:
        file.write(json.dumps(arguments) + "\n")
    reply = scripted(" ".join(arguments))
    if reply is not None:
        sys.stdout.write(reply.get("out", ""))
        sys.stderr.write(reply.get("err", ""))
        return reply.get("code", 0)
    options = dict(word.split("=", 1) for word in arguments if word.startswith("--") and "=" in word)
    names = [word for word in arguments if not word.startswith("--")]
    host = FAKE / "host"
    if names[0] == "storage":
        return storage(names[1], options, names[2:])
    if names[2:4] == ["tpu-vm", "ssh"] and host.is_dir():
        os.chdir(host)
        os.execvpe("bash", ["bash", "-c", options["--command"]], os.environ | {"HOME": str(host)})
    if names[2:4] == ["tpu-vm", "scp"] and host.is_dir():
        copyfile(names[4], host / names[5].split(":", 1)[1])
    return 0


sys.exit(main(sys.argv[1:]))
