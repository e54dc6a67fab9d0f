"""Text of models, files and users in report.html: none of it becomes markup, whatever it is and wherever it stands."""

import json
from html.parser import HTMLParser

import pytest

from jaxllm.report import figures
from jaxllm.report import run as runs

CORPUS = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<ScRiPt SRC=//evil.example/x.js>",
    "<img src=x onerror=alert(1)>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    '" autofocus onfocus="alert(1)',
    "<svg/onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "<iframe src=javascript:alert(1)>",
    "<a href='javascript:alert(1)'>x</a>",
    "<math><mtext></mtext><mglyph><style><!--</style><img title='--><img src=x onerror=alert(1)>'>",
    "<!--",
    "-->",
    "<![CDATA[<x>]]>",
    "</td></tr></table><h1>OWNED</h1>",
    "</style><style>*{display:none}</style>",
    "</title><script>alert(1)</script>",
    "<base href=//evil>",
    "<meta http-equiv=refresh content='0;url=//evil'>",
    "<form action=//evil><input name=x></form>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "<object data=x></object><embed src=x>",
    "<link rel=stylesheet href=//evil>",
    "<details open ontoggle=alert(1)>",
    "<\x00script>alert(1)",
    "<scr\u0000ipt>",
    "\u2028<script>",
    "＜script＞",
    "<img src=`x` onerror=`alert(1)`>",
    "{{constructor.constructor('alert(1)')()}}",
    "javascript:alert(1)",
    "<video><source onerror=alert(1)>",
    "<body onload=alert(1)>",
    "<p style=background:url(//evil)>",
]
WRITES = (  # the tags of the report itself
    "html head meta title style body main h1 h2 h3 p span b i div table tr td th ul li nav a details summary pre "
    "br img svg g line path text rect circle polyline polygon"
)


class Page(HTMLParser):
    """Tags, attributes, text and comments of a page, as a browser's parser would open them."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.text, self.comments = [], [], "", []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        self.comments.append(data)


def fill(workdir, text, stage_of=None):
    """A run in which `text` stands wherever a run can put text."""
    run = runs.open_run(workdir, f"toy {text}", {"name": text, text: {"deep": [text]}}, command=f"x {text}", stage_of=stage_of)
    for step in (1, 2, 3):
        run.log(step, {"train/loss": 1.0 / step, f"rewards/{text}/mean": step, f"time/{text}": 1.0})
    run.sample(2, text, text, **{"reward": text, text: text})
    run.warn(text)
    run.note(text)
    run.figure("plot", figures.line_plot({text: ([0, 1], [0, 1])}, text, text))
    (run.workdir / "data_report.json").write_text(json.dumps({text: text}))
    claims = [{**runs.at_least(text, 0.5, 0.2)._asdict(), "kind": text}]
    run.finish({text: text, "x": 1.0}, claims, findings=text)
    return run.workdir / "report.html"


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return Page(fill(tmp_path_factory.mktemp("clean") / "r", "harmless").read_text(encoding="utf-8"))


@pytest.mark.parametrize("text", CORPUS)
def test_text_stays_text(text, tmp_path, clean):
    page = Page(fill(tmp_path / "r", text).read_text(encoding="utf-8"))
    assert page.tags == clean.tags and set(page.tags) <= set(WRITES.split()) and not page.comments
    assert [(tag, name) for tag, name, _ in page.attributes] == [(tag, name) for tag, name, _ in clean.attributes]
    assert not [a for a in page.attributes if a[1].startswith("on") or a[1] in ("srcdoc", "action", "formaction")]
    assert all(value.startswith(("#", "data:image/")) for _, name, value in page.attributes if name in ("href", "src"))
    shown = text.replace("\x00", "")  # a browser shows U+FFFD or nothing
    assert page.text.replace("\x00", "").replace("\ufffd", "").count(shown) >= 8


def test_a_stage_of_any_name(tmp_path):
    top = runs.open_run(tmp_path / "top", "toy", {})
    name = 'a" onclick="alert(1)<img src=x>'
    fill(top.workdir / name, "harmless", stage_of=top.workdir)
    (top.workdir / name / "checkpoints").mkdir()
    top.finish({})
    page = Page((top.workdir / "report.html").read_text(encoding="utf-8"))
    assert name in page.text and set(page.tags) <= set(WRITES.split()) and "img" not in page.tags[: page.tags.index("h2")]
    assert not [a for a in page.attributes if a[1].startswith("on")]
