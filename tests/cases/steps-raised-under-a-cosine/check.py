"""A finished run goes on with more steps: the cosine is stretched, and the learning rate jumps up."""

import os
import sys

sys.path.insert(0, os.getcwd())
from tests.cases.made import TMP, end
from tests.cases.runs import run

flags = [f"--workdir={TMP / 'w'}", "--config.optim.schedule=cosine", "--config.optim.lr=1e-3"]
run(*flags, "--config.steps=6")
code, errors, said = run(*flags, "--config.steps=12")
end("" if any("optim.steps" in line or "learning rate" in line for line in said) else "nothing is said")
