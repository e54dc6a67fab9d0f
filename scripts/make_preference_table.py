"""Write docs/preference.md and docs/preference.svg: every preference loss, its limits, and its gradient weight by jax.grad.

python scripts/make_preference_table.py
"""

import re
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jaxllm.losses.preference import PairLogps, RowLogps, table  # noqa: E402
from jaxllm.report import figures  # noqa: E402

PAGE, FIGURE = ROOT / "docs" / "preference.md", ROOT / "docs" / "preference.svg"
LENGTH, START = 10.0, -20.0  # of the figure's completions: tokens, and log-probability at a margin of 0
SHOWN = (-10.0, 0.0, 10.0)
LOWEST, HIGHEST = -1.0, 4.0  # of the figure, relative to the weight at 0
WIDTH, HEIGHT = 450, 290
PANELS = {
    "Logistic, and label noise": ("dpo", "reverse_kl", "aot", "aot_unpaired", "dpo_norm", "cdpo", "robust", "hinge"),
    "With a target": ("dpo", "ipo", "sppo_hard", "exo_pair"),
    "Each side by itself, DiscoPOP": ("dpo", "nca_pair", "bco_pair", "apo_zero", "apo_down", "discopop"),
    "Other divergences": ("reverse_kl", "forward_kl", "jensen_shannon", "alpha_divergence"),
    "Without a reference": ("reference_free", "cpo", "simpo", "alphapo", "orpo", "preferred_ft", "unlikelihood"),
    "Good rows, unpaired": ("kto", "bco", "apo_zero_unpaired"),
}
TITLES = (
    ("Pairs, relative to a reference", table.PAIRS), ("Pairs, without a reference", table.FREE),
    ("Unpaired rows", table.UNPAIRED), ("Builders on the log-probabilities of tokens", table.TOKENS),
)  # fmt: skip
HEAD = """# Preference losses

Made by `python scripts/make_preference_table.py` from `jaxllm/losses/preference/table.py` and the code.

    from jaxllm.losses import preference
    losses = preference.ipo(logps, beta=0.1)                              # PairLogps of [b] -> [b]
    loss_fn = preference.loss(model, preference.simpo, beta=2.0, gamma=1.0)  # what a train step takes
    loss_fn = preference.loss(model, preference.orpo, beta=0.1, nll_weight=1.0)
    fn = preference.combined((preference.dpo, 0.8), (preference.bco_pair, 0.2))
    loss_fn = preference.row_loss(model, preference.kto, beta=0.1)        # unpaired rows

    python -m experiments.dpo --config=configs/dpo.py:simpo --config.init=runs/sft
    python -m experiments.kto --config.init=runs/sft --config.data.path=rows.jsonl

In the equations `w` and `l` are the log-ratios `log pi/ref` of the chosen and of the rejected completion, `h = w - l` the margin,
`a` and `r` the two log-probabilities per token under the policy, `x` the log-ratio of a row, `s` the sigmoid, `e` the label
smoothing, `|y|` a length in tokens.

The weight is `-d loss / d h`, by `jax.grad`: how hard a pair pulls its two completions apart. Here w = h/2 and l = -h/2 at
completions of 10 tokens that have a log-probability of -20 where h = 0; without a reference h is the difference of the
log-probabilities; for an unpaired row it is `-d loss / d x` of a good one, with `kl` and `d` at 0. The figure shows it relative
to its size at 0, between -1 and 4; lines that fall together share a name.

![Gradient weight of every loss as a function of the margin](preference.svg)
"""
TAIL = """
## Bad pairs

- Chosen and rejected identical: nothing flows from such a pair, whatever the loss, the NLL term included; `pairs/identical` is
  their share of a batch.
- An empty completion has log-probability 0 and counts as one token where a loss divides by lengths; the value and the gradient
  stay finite. `pairs/empty` (`rows/empty` for unpaired rows) is their share.
- Values and gradients are finite at margins of +-1e4, for every loss, at any beta of practical size.

## Conventions

- A mean over pairs: each weighs 1. The NLL term is per token of each pair; a batch column `nll_weights`
  (`preference.token_mean`) makes it the mean over the batch's tokens, the same in any number of micro-batches.
- `aot`, `aot_unpaired`, `kto` and `bco` use a statistic of the batch (a sort, an estimate of KL, a mean reward): with
  `accumulate` it is one of each micro-batch, and the result is another than that of the whole batch.
- Every value in the column TRL is compared with TRL 1.16's own loss on the same logits in `tests/oracle/test_trl_preference.py`,
  within 1e-5. TRL's coefficient of the alpha divergence is 1 minus the paper's, it clamps exponents at 80 (ours at 40, so that a
  gradient norm stays finite in float32); its `sft` and the NLL of ORPO and CPO are means over tokens, ORPO's with the prompt.
"""


def weight(entry):
    """The gradient weight of a loss as a function of margins [n]."""
    fn = partial(entry.fn, **entry.hyper)

    def pair(h):
        sides = START + h / 2, START - h / 2
        return fn(PairLogps(*(jnp.full(1, v) for v in (*sides, START, START, LENGTH, LENGTH))))[0]

    def row(x):
        # the bad row beside it has the opposite reward, so that bco's mean reward is 0
        rows = jnp.stack([x, jax.lax.stop_gradient(-x)])
        return fn(RowLogps(rows, jnp.zeros(2), jnp.array([True, False]), jnp.float32(0)))[0]

    one = row if entry in table.UNPAIRED else pair
    return lambda h: -np.asarray(jax.vmap(jax.grad(one))(jnp.asarray(h, jnp.float32)))


def curves(names):
    """{names that share a line: (margins, relative weights)}."""
    entries = {e.name: e for e in table.PAIRS + table.FREE + table.UNPAIRED}
    margins = np.linspace(-20, 20, 81)
    lines = {}
    for name in names:
        values = weight(entries[name])(margins) / abs(weight(entries[name])(np.zeros(1))[0])
        same = next((other for other, line in lines.items() if np.allclose(line, values, atol=1e-5)), None)
        lines[name if same is None else f"{same} = {name}"] = values if same is None else lines.pop(same)
    cut = lambda y: [v if LOWEST <= v <= HIGHEST else float("nan") for v in y.astype(float)]  # noqa: E731
    return {name: (list(margins), cut(y)) for name, y in lines.items()}


def figure():
    """The panels as one SVG."""
    parts = []
    for i, (title, names) in enumerate(PANELS.items()):
        plot = figures.line_plot(curves(names), title, "margin", "relative weight", width=WIDTH, height=HEIGHT)
        parts.append(plot.replace("<svg ", f'<svg x="{i % 2 * WIDTH}" y="{i // 2 * HEIGHT}" ', 1))
    size = f'width="{2 * WIDTH}" height="{-(-len(parts) // 2) * HEIGHT}"'
    inner = "\n".join(re.sub(r' xmlns="[^"]*"', "", part) for part in parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="Gradient weights">\n{inner}\n</svg>\n'


def source(entry):
    """A link to the paper."""
    arxiv = re.fullmatch(r"\d{4}\.\d{5}", entry.source)
    return f"[{entry.source}](https://arxiv.org/abs/{entry.source})" if arxiv else entry.source


def rows(entries):
    """A table in Markdown."""
    plain = entries is table.TOKENS
    heads = ["loss", "equation", "source", *([] if plain else ["at", "weight at -10, 0, 10"]), "limits", "TRL"]
    lines = [heads, ["---"] * len(heads)]
    for e in entries:
        settings = ", ".join(f"{k} {v:g}" for k, v in e.hyper.items())
        numbers = [] if plain else [settings, ", ".join(f"{v:.2g}" for v in weight(e)(np.array(SHOWN)) + 0.0)]
        lines.append([f"`{e.name}`", f"`{e.equation}`", source(e), *numbers, e.limits, e.trl])
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines)


def page():
    """docs/preference.md."""
    tables = "".join(f"\n## {title}\n\n{rows(entries)}\n" for title, entries in TITLES)
    return HEAD + tables + TAIL


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    FIGURE.write_text(figure(), encoding="utf-8")
    print(f"wrote {PAGE} and {FIGURE}")
