"""Write the tables of docs/metrics.md from jaxllm/report/metrics.py.

python scripts/make_metrics.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jaxllm.report import metrics  # noqa: E402

PAGE = ROOT / "docs" / "metrics.md"


def filled(page: str) -> str:
    """The page with what stands between its markers made anew."""
    for name in metrics.SECTIONS:
        start, end = f"<!-- {name}: made by scripts/make_metrics.py -->", f"<!-- end of {name} -->"
        before, rest = page.split(start)
        page = f"{before}{start}\n{metrics.table(name)}\n{end}{rest.split(end)[1]}"
    return page


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}: {len(metrics.SECTIONS)} tables")


if __name__ == "__main__":
    main()
