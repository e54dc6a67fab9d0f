"""report.html: one self-contained file with all that a run has, and nothing that model text smuggles in."""

import re
from html.parser import HTMLParser

import pytest

from jaxllm.report import figures, html
from jaxllm.report import run as runs

EVIL = '<script>alert("x")</script>'


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.text, self.unclosed = [], [], "", []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "br"):
            self.unclosed.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.unclosed.pop() == tag

    def handle_data(self, data):
        self.text += data


def train(workdir, experiment, claims=(), **kwargs):
    run = runs.open_run(workdir, experiment, {"steps": 9, "optim": {"lr": 0.25}, "name": EVIL}, **kwargs)
    for step in range(1, 10):
        rewards = {"rewards/chosen": step, "rewards/rejected": -step, "objective/kl": 0.1 * step, "guard/skipped": 0.0}
        run.log(step, {"train/loss": 9 / step, "train/lr": 0.1 / step, "perf/tokens_per_second": 5000.0, **rewards})
    run.log(9, {"eval/loss": 1.5})
    run.sample(9, "say " + EVIL, EVIL, stage="sft")
    run.warn("careful: " + EVIL)
    run.figure("calibration", figures.calibration_plot([0.5], [0.5], [3]))
    metrics = {"clip_ratio/low_mean": 0.0, "accuracy": 0.875, "eval/reward": 0.25}
    run.finish(metrics, claims, then="chat --run=w && <b>")
    return run


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    claims = [runs.at_least("gold", 0.5, 0.2), runs.at_most("kl " + EVIL, 2.5, 2.0)]
    command = "python -m experiments.toy --workdir=w"
    run = train(tmp_path_factory.mktemp("r") / "run", "toy", claims, command=command)
    return (run.workdir / "report.html").read_text()


def test_one_file_well_formed_without_scripts_or_links_outside(page):
    parsed = Page(page)
    assert not parsed.unclosed
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    addresses = [value for name, value in parsed.attributes if name in ("src", "href")]
    assert addresses and all(value.startswith(("data:image/", "#")) for value in addresses)
    assert "http" not in re.sub(r'xmlns="http://www.w3.org/2000/svg"|data:image/[^"]*', "", page)


def test_untrusted_text_is_shown_as_text(page):
    assert EVIL not in page
    assert Page(page).text.count(EVIL) >= 5  # claim, warning, prompt, text, config


def test_what_a_reader_looks_for_is_there(page):
    text = Page(page).text
    for part in ("1 of 2 claims hold", ">= 0.2", "✓", "✗", "0.875", "python -m experiments.toy --workdir=w"):
        assert part in text, part
    for title in ("Loss", "Learning rate", "Tokens per second", "rewards: chosen, rejected", "objective/kl"):
        assert f'aria-label="{title}"' in page, title
    assert "optim.lr" in text and "0.25" in text and "jax" in text


def test_a_metric_that_never_changes_is_said_and_not_drawn(page):
    assert "The same at every logged step: guard/skipped 0." in Page(page).text
    assert 'aria-label="guard/skipped"' not in page


def test_the_headline_is_of_results_and_not_of_bookkeeping(page):
    names = re.findall(r'<div class="card"><b>[^<]*</b><span>([^<]*)', page)
    assert names[-3:] == ["eval/reward", "accuracy", "clip_ratio/low_mean"]


def test_the_report_ends_with_verdicts_and_the_next_command(page):
    heads = re.findall(r"<h3>(\w+)", page)
    assert heads[-2:] == ["Verdicts", "Next"] and page.rstrip().endswith("</pre>\n</main></body></html>")
    assert "python -m experiments.chat --run=w && <b>" in Page(page).text


def test_many_warnings_do_not_fill_the_page(tmp_path):
    run = runs.open_run(tmp_path / "r", "toy", {})
    (run.workdir / "log.txt").write_text("".join(f"00:00:00 WARNING number {i}\n" for i in range(5000)))
    text = Page(html.write_report(run.workdir).read_text()).text
    assert "number 49" in text and "number 50" not in text and "4,950 more in log.txt" in text


def test_stages_are_sections_of_the_same_file(tmp_path):
    top = runs.open_run(tmp_path / "q", "quickstart", {"seed": 0})
    for name in ("pretrain", "dpo"):
        train(tmp_path / "q" / name, name, [runs.at_least("x", 1, 0)], stage_of=top.workdir)
    (tmp_path / "q" / "checkpoints").mkdir()
    top.finish({}, [])
    page = (top.workdir / "report.html").read_text()
    assert re.findall(r'<h2 id="(\w+)">', page) == ["pretrain", "dpo"]
    assert re.findall(r'<a href="#(\w+)">', page) == ["pretrain", "dpo"]
    assert page.count("1 of 1 claims hold") == 2


def test_a_run_cut_short_still_has_a_report(tmp_path):
    run = runs.open_run(tmp_path / "r", "toy", {"steps": 9})
    run.log(1, {"train/loss": 1.0, "x": float("nan")})
    with open(run.workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "tr')
    text = Page(html.write_report(run.workdir).read_text()).text
    assert "not finished" in text
    html.write_report(tmp_path)  # a directory that is no run: an empty page, no crash
