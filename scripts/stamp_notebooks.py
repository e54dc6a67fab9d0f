"""Write the repository's address into the notebooks' badges, links and install lines: python scripts/stamp_notebooks.py

The one place of the address is `Repository` in pyproject.toml. While it says OWNER, badges lead nowhere; set it and run this.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAME = r"[\w.-]+/[\w.-]+"
LINK = re.compile(rf'(?<=github\.com/){NAME}(?=/blob/main/|\\")|(?<=research\.google\.com/github/){NAME}(?=/blob/)')


def repository() -> str:
    """owner/name of the address in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"].removeprefix("https://github.com/")


def stamped(text: str) -> str:
    """A notebook's text with this repository in its links."""
    return LINK.sub(repository(), text)


def main() -> None:
    for file in NOTEBOOKS:
        file.write_text(stamped(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
