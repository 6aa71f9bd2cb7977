"""Worker processes where /dev/shm is small (64 MB in containers); needs root, for a mount of its own."""

import os
import sys

sys.path.insert(0, os.getcwd())
from tests.cases.made import TMP, end
from tests.cases.runs import run

if os.geteuid():
    print("skipped: needs root")
    sys.exit(0)
shell = ["unshare", "-m", "bash", "-c", 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "x"]
flags = [f"--workdir={TMP / 'w'}", "--config.data.workers=1", "--config.batch=64"]
code, errors, said = run(*flags, "--config.tasks.chat.template.length=4096", before=shell)
told = " ".join(errors).lower()
end("" if code == 0 or "shm" in told or "shared memory" in told else str(errors or said[-3:]))
