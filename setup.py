"""The README as the package page shows it: its links, which are relative in the repository, lead to the repository.

All else about the package is in pyproject.toml.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
source = re.search(r'^Source = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
text = re.sub(r"\]\((?!https?:|#)", f"]({source}/", (ROOT / "README.md").read_text())
setup(long_description=text, long_description_content_type="text/markdown", script_name="setup.py")  # not a part of it
