"""A path that begins with ~, which no shell expands behind --workdir=."""

import os
import sys

sys.path.insert(0, os.getcwd())
from tests.cases.made import TMP, end
from tests.cases.runs import run

home, here = TMP / "home", TMP / "here"
home.mkdir()
here.mkdir()
code, errors, said = run("--workdir=~/run", env={"HOME": str(home)}, cwd=here)
end(
    "a folder called ~ appears" if (here / "~").exists() else "",
    "" if (home / "run").exists() or errors else "nothing in the home folder",
)
