"""The site: python -m sphinx -W docs build/docs. Nothing is fetched, neither while it is built nor while it is read."""

import re
import shutil
import sys
from pathlib import Path

import latex2mathml.converter
from docutils import nodes

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project, html_title = "jaxllm", "jaxllm"
extensions = ["myst_nb", "sphinx.ext.autodoc"]
html_theme = "furo"
html_copy_source = html_show_copyright = False
html_math_renderer = "mathml"
html_static_path = html_css_files = ["site.css"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
myst_update_mathjax = False
nb_execution_mode = "off"  # scripts/run_notebook.py executes them
nb_merge_streams = True
highlight_language = "text"
smartquotes = False  # what stands in quotes is to be copied
suppress_warnings = [
    "misc.highlighting_failure",  # rows with ... in them are no JSON
    "myst.header",  # studies begin with figures
]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}

BADGES = re.compile(r"\[!\[([^\]]+)\]\([^)]+\)\]\(([^)]+)\)")


def take_notebooks(app):
    """Copies of the notebooks as pages: executed ones of build/notebooks where they are, badges as words."""
    (target := Path(app.srcdir) / "notebooks").mkdir(exist_ok=True)
    for file in (ROOT / "notebooks").glob("*.ipynb"):
        executed = ROOT / "build" / "notebooks" / file.name
        shutil.copyfile(executed if executed.is_file() else file, target / file.name)


def as_pages(app, name, source):
    """Links of the repository as links of the site; the index lists what is there."""
    text = re.sub(r"\]\(((?:\.\./)*)\.\./notebooks/", r"](\1notebooks/", source[0])
    source[0] = BADGES.sub(r"[\1](\2)", listed(text, Path(app.srcdir)) if name == "index" else text)


def listed(index, pages):
    """The index without patterns (`doctor*`) that no page matches, which Sphinx warns of; `*` is every page that is not named."""
    names = re.findall(r"^[\w/]+\*?$", index, re.MULTILINE)
    named = {page.stem for name in names for page in pages.glob(f"{name}.md")} | {"index"}
    rest = "\n".join(sorted(page.stem for page in pages.glob("*.md") if page.stem not in named))
    for name in names:
        if name.endswith("*") and not list(pages.glob(f"{name}.*")):
            index = index.replace(f"\n{name}\n", "\n")
    return re.sub(r"^\*$", rest, index, flags=re.MULTILINE)


def plain_docstring(app, what, name, obj, options, lines):
    """Docstrings are plain text with `code`, not reStructuredText: indented blocks stay as they are, signs mean themselves."""
    out, before = [], ""
    for line in lines:
        if line.startswith("    "):
            out += ([] if before.startswith("    ") else ["", "::", ""]) + [line]
        elif line.strip():
            marked = re.split(r"(`[^`]+`)", line)
            escaped = [rf"`{part}`\ " if i % 2 else re.sub(r"([\\*_|`])", r"\\\1", part) for i, part in enumerate(marked)]
            out += ([""] if before.startswith("    ") else []) + ["".join(escaped).strip()]
        else:
            out.append("    " if before.startswith("    ") else "")
        before = line if line.strip() else before if before.startswith("    ") else ""
    lines[:] = out


def skip_fields(app, what, name, obj, skip, options):
    return skip or (getattr(obj, "__doc__", None) or "").startswith("Alias for field number")


def math_of(display):
    def visit(self, node):
        self.body.append(latex2mathml.converter.convert(node.astext(), display=display))
        raise nodes.SkipNode

    return visit, None


def setup(app):
    app.add_html_math_renderer("mathml", math_of("inline"), math_of("block"))
    app.connect("builder-inited", take_notebooks)
    app.connect("source-read", as_pages)
    app.connect("autodoc-process-docstring", plain_docstring)
    app.connect("autodoc-skip-member", skip_fields)
    return {"parallel_read_safe": True}
