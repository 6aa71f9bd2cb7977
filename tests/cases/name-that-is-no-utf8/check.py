"""A workdir whose name is not UTF-8, as folders of older systems are (b'm\\xfcller')."""

import os
import sys

sys.path.insert(0, os.getcwd())
from tests.cases.made import TMP, end
from tests.cases.runs import run

work = os.fsdecode(os.fsencode(TMP) + b"/m\xfcller")
code, errors, said = run(f"--workdir={work}")
kept = [n for n in os.listdir(f"{work}/checkpoints") if n.isdigit()] if os.path.isdir(f"{work}/checkpoints") else []
trained = os.path.exists(f"{work}/log.jsonl") and os.path.getsize(f"{work}/log.jsonl") > 0
wrong = f"it trained and kept nothing: {errors}".encode(errors="replace").decode()
end("" if kept or (code and not trained) else wrong)
