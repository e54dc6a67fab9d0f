"""The preference losses as data: equation, source, limits; docs/preference.md and its figure are made from it.

In the equations w and l are the log-ratios log pi/ref of the chosen and the rejected completion, h = w - l, a and r their
log-probabilities per token under the policy, x the log-ratio of a single row, s the sigmoid, |y| a length in tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxllm.losses.preference import divergence, free, pairs, tokens, unpaired


class Entry(NamedTuple):
    """A loss: the function, its equation in plain text, its source, what happens at its limits, the peer's name for it.

    hyper: the settings of the figure, and of tests that want an example.
    """

    fn: Callable[..., Any]
    equation: str
    source: str
    limits: str
    hyper: dict[str, float]
    trl: str = ""

    @property
    def name(self) -> str:
        """The name under jaxllm.losses.preference."""
        return self.fn.__name__


B = {"beta": 0.1}
SMOOTH = {"beta": 0.1, "label_smoothing": 0.1}

# losses on PairLogps, relative to a reference
PAIRS = (
    Entry(
        pairs.dpo,
        "-log s(beta h)",
        "2305.18290",
        "beta -> 0: log 2, no gradient; h -> inf: weight 0; h -> -inf: weight beta",
        B,
        "DPO sigmoid",
    ),
    Entry(
        pairs.dpo_norm, "-log s(beta (w/|y_w| - l/|y_l|))", "2411.15124", "lengths of 1: dpo", {"beta": 1.0}, "DPO sigmoid_norm"
    ),
    Entry(
        pairs.cdpo,
        "-(1 - e) log s(beta h) - e log s(-beta h)",
        "Mitchell 2023",
        "e = 0: dpo; minimum at beta h = log((1 - e)/e)",
        SMOOTH,
    ),
    Entry(
        pairs.robust,
        "(-(1 - e) log s(beta h) + e log s(-beta h)) / (1 - 2e)",
        "2403.00409",
        "e = 0: dpo; h -> inf: unbounded below, weight beta e/(1 - 2e)",
        SMOOTH,
        "DPO robust",
    ),
    Entry(pairs.hinge, "max(0, 1 - beta h)", "2305.10425", "weight beta below beta h = 1, 0 above", B, "DPO hinge"),
    Entry(
        pairs.ipo,
        "(w/|y_w| - l/|y_l| - 1/(2 beta))^2",
        "2310.12036",
        "minimum at a margin per token of 1/(2 beta)",
        {"beta": 0.5},
        "DPO ipo",
    ),
    Entry(
        pairs.exo_pair,
        "KL((s(beta h), s(-beta h)) || (1 - e, e))",
        "2402.00856",
        "minimum 0 at beta h = log((1 - e)/e); weight 0 at both ends; 0 < e < 1",
        SMOOTH,
        "DPO exo_pair",
    ),
    Entry(
        pairs.nca_pair,
        "-log s(beta w) - log s(-beta w)/2 - log s(-beta l)/2",
        "2402.05369",
        "w: minimum at s(beta w) = 2/3; l -> -inf: falls for ever",
        B,
        "DPO nca_pair",
    ),
    Entry(
        pairs.bco_pair,
        "-log s(beta w) - log s(-beta l)",
        "2404.04656",
        "an upper bound of dpo; no running shift",
        B,
        "DPO bco_pair",
    ),
    Entry(
        pairs.sppo_hard,
        "(w - 1/(2 beta))^2 + (l + 1/(2 beta))^2",
        "2405.00675",
        "minimum at w = -l = 1/(2 beta)",
        B,
        "DPO sppo_hard",
    ),
    Entry(
        pairs.aot,
        "-log s(beta (sort(w + ref_w - l - ref_l) - sort(ref_w - ref_l)))",
        "2406.05882",
        "a sort over the batch; b = 1: dpo",
        B,
        "DPO aot",
    ),
    Entry(
        pairs.aot_unpaired,
        "-log s(beta (sort(w) - sort(l)))",
        "2406.05882",
        "a sort over the batch; b = 1: dpo",
        B,
        "DPO aot_unpaired",
    ),
    Entry(pairs.apo_zero, "1 - s(beta w) + s(beta l)", "2408.06266", "between 0 and 2; weight 0 at both ends", B, "DPO apo_zero"),
    Entry(pairs.apo_down, "s(beta w) + 1 - s(beta h)", "2408.06266", "between 0 and 2; both likelihoods fall", B, "DPO apo_down"),
    Entry(
        pairs.discopop,
        "s(-z/tau) softplus(-z) + s(z/tau) exp(-z), z = beta h",
        "2406.08414",
        "h -> -inf: dpo; h -> inf: exp(-z); not convex at 0; 0 < tau < 1",
        {"beta": 0.1, "tau": 0.05},
        "DPO discopop",
    ),
    Entry(divergence.reverse_kl, "-log s(beta (w - l))", "2309.16240", "dpo", B, "DPO reverse_kl"),
    Entry(
        divergence.forward_kl,
        "-log s(beta (exp(-l) - exp(-w)))",
        "2309.16240",
        "dpo to first order; clamped at log-ratios below -40",
        B,
        "DPO forward_kl",
    ),
    Entry(
        divergence.jensen_shannon,
        "-log s(beta (log s(w) - log s(l)))",
        "2309.16240",
        "beta/2 to first order; bounded above in w",
        B,
        "DPO js_divergence",
    ),
    Entry(
        divergence.alpha_divergence,
        "-log s(beta (exp(-alpha l) - exp(-alpha w)) / alpha)",
        "2309.16240",
        "alpha = 0: dpo; alpha = 1: forward_kl; clamped at log-ratios below -40/alpha",
        {"beta": 0.1, "alpha": 0.5},
        "DPO alpha_divergence (1 - alpha)",
    ),
)
# losses on PairLogps that do not read the reference
FREE = (
    Entry(free.reference_free, "-log s(beta (log pi(y_w) - log pi(y_l)))", "2305.18290", "dpo with a uniform reference", B),
    Entry(
        free.cpo,
        "-log s(beta (log pi(y_w) - log pi(y_l))); + NLL by the builder",
        "2401.08417",
        "reference_free",
        B,
        "CPO sigmoid",
    ),
    Entry(
        free.simpo,
        "-log s(beta (a - r) - gamma)",
        "2405.14734",
        "gamma = 0, lengths of 1: reference_free",
        {"beta": 2.0, "gamma": 1.0},
        "CPO simpo",
    ),
    Entry(
        free.alphapo,
        "-log s(beta (exp(-alpha r) - exp(-alpha a))/alpha - gamma)",
        "2501.03884",
        "alpha = 0: simpo; exponents clamped at 40",
        {"beta": 2.0, "gamma": 1.0, "alpha": 0.25},
        "CPO simpo, alpha",
    ),
    Entry(
        free.orpo,
        "-beta log s(log(e^a/(1 - e^a)) - log(e^r/(1 - e^r))); + NLL by the builder",
        "2403.07691",
        "e^a, e^r at most 1 - 1e-6",
        B,
        "ORPO",
    ),
    Entry(free.preferred_ft, "-a", "2305.18290", "weight constant; the rejected does not enter", {}, "DPO sft"),
    Entry(
        free.unlikelihood,
        "-a - alpha log(1 - e^r)",
        "1908.04319",
        "alpha = 0: preferred_ft; e^r at most 1 - 1e-6",
        {"alpha": 0.5},
    ),
)
# losses on RowLogps, for a good row; the bad one's is its mirror image
UNPAIRED = (
    Entry(
        unpaired.kto,
        "good: 1 - s(beta (x - kl)); bad: 1 - s(beta (kl - x))",
        "2402.01306",
        "between 0 and 1; weight 0 at both ends; kl over the batch",
        B,
        "KTO kto",
    ),
    Entry(
        unpaired.bco,
        "good: -log s(beta x - d); bad: -log s(d - beta x)",
        "2404.04656",
        "beta -> 0: log 2; d is the batch's mean reward, without gradient",
        B,
    ),
    Entry(
        unpaired.apo_zero_unpaired,
        "good: 1 - s(beta x); bad: s(beta x)",
        "2408.06266",
        "kto with kl = 0",
        B,
        "KTO apo_zero_unpaired",
    ),
)
# builders on the log-probabilities of tokens: no function of the margin alone
TOKENS = (
    Entry(
        tokens.ld_dpo,
        "dpo on sums whose tokens beyond the shorter length weigh alpha",
        "2409.06411",
        "alpha = 1: dpo",
        {"beta": 0.1, "alpha": 0.5},
        "DPO ld_alpha",
    ),
    Entry(
        tokens.wpo,
        "w(y_w) w(y_l) times a sibling, w = exp(mean of log pi(y_t) - log sum_v pi(v)^2)",
        "2406.11827",
        "all tokens certain: w = 1; w has no gradient",
        B,
        "DPO use_weighting",
    ),
    Entry(
        tokens.token_unlikelihood,
        "-a - alpha mean of log(1 - pi(y_l,t))",
        "1908.04319",
        "alpha = 0: preferred_ft; pi at most 1 - 1e-6",
        {"alpha": 0.5},
    ),
)
