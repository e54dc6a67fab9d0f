"""docs/studies.md from the results of the studies: python scripts/make_studies.py --runs=DIR

DIR has a run directory for each study, named after it: `python -m experiments.studies.<name> --workdir=DIR/<name>`. Figures are
copied to docs/studies/.
"""

from __future__ import annotations

import argparse
import ast
import html
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STUDIES = ROOT / "experiments" / "studies"
DOCS = ROOT / "docs"
HEAD = """# The studies

Made by `python scripts/make_studies.py` from the studies' own results; `python -m experiments.studies.<name>` repeats one in
minutes on two cores, `--config=configs/studies/<name>.py:full` at an accelerator's size. Everyone who prefers, judges or rates
in them is simulated. A **gate** is arithmetic or known to be robust and must hold; a **finding** is reported either way.
Intervals are 95 % over seeds (Student's t), each seed with its own world, reference model and reward model. A finding whose
interval holds its bound is undecided, whatever its mean; one without an interval is judged by its value.

| study | asks | gates | findings: yes, undecided, no |
|---|---|---|---|
"""


def names() -> list[str]:
    """The studies, in the order of their files: modules, and packages with a __main__."""
    packages = [p.parent.name for p in STUDIES.glob("*/__main__.py")]
    return sorted([p.stem for p in STUDIES.glob("*.py") if p.stem != "__init__"] + packages)


def question(name: str) -> str:
    """The first line of a study's docstring."""
    file = STUDIES / f"{name}.py"
    file = file if file.exists() else STUDIES / name / "__main__.py"
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))).splitlines()[0]


def verdict(claim: dict) -> str:
    """A gate holds or fails; a finding is yes or no where its interval is clear of the bound, else undecided."""
    if claim["kind"] == "gate":
        return "holds" if claim["holds"] else "**fails**"
    low, high, bound = claim["low"], claim["high"], claim["bound"]
    if low is not None and high is not None and low < bound < high:
        return "undecided"
    return "yes" if claim["holds"] else "no"


def counts(claims: list[dict]) -> str:
    """The two last cells of a study's line: gates that hold, and findings by verdict."""
    gates, found = ([verdict(c) for c in claims if c["kind"] == kind] for kind in ("gate", "finding"))
    return f"{gates.count('holds')} of {len(gates)} | {', '.join(str(found.count(v)) for v in ('yes', 'undecided', 'no'))}"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def claim_row(claim: dict) -> str:
    interval = "" if claim["low"] is None else f" [{number(claim['low'])}, {number(claim['high'])}]"
    sign = "at least" if claim["better"] == "more" else "at most"
    cells = claim["name"], number(claim["value"]) + interval, f"{sign} {number(claim['bound'])}", claim["kind"], verdict(claim)
    return f"| {' | '.join(cells)} |"


def title_of(figure: Path) -> str:
    """The figure's title, for those who do not see it."""
    found = re.search(r'aria-label="([^"]*)"', figure.read_text(encoding="utf-8"))
    return re.sub(r"[\[\]]", "", html.unescape(found[1])) if found and found[1] else figure.stem.replace("_", " ")


def section(name: str, run: Path, result: dict) -> str:
    """One study: its question, figures, claims and findings."""
    figures = sorted((run / "figures").glob("*.svg"))
    for figure in figures:
        shutil.copyfile(figure, DOCS / "studies" / f"{name}.{figure.name}")
    shown = "\n".join(f"![{title_of(f)}](studies/{name}.{f.name})" for f in figures)
    rows = "\n".join(claim_row(c) for c in result["claims"])
    table = f"| claim | measured | bound | kind | |\n|---|---|---|---|---|\n{rows}"
    return f"## {name}\n\n{question(name)}\n\n{shown}\n\n{table}\n\n{result['findings']}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True)
    runs = parser.parse_args().runs
    (DOCS / "studies").mkdir(exist_ok=True)
    results = {n: json.loads((runs / n / "result.json").read_text(encoding="utf-8")) for n in names()}
    rows = [f"| [{n}](#{n}) | {question(n)} | {counts(r['claims'])} |" for n, r in results.items()]
    sections = [section(n, runs / n, r) for n, r in results.items()]
    (DOCS / "studies.md").write_text(HEAD + "\n".join(rows) + "\n\n" + "\n".join(sections), encoding="utf-8")


if __name__ == "__main__":
    main()
