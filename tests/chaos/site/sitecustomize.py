"""Python imports this at its start where the folder is on PYTHONPATH: the processes of Ray, with a fault to come."""

import os
import runpy
from pathlib import Path

if os.environ.get("VILADIFF_TESTS_FAULT"):
    runpy.run_path(str(Path(__file__).parents[1] / "hook.py"))["install_from_environment"]()
