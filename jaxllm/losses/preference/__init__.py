"""Preference losses: siblings on PairLogps (pairs, free, divergence) and on RowLogps (unpaired), and builders of LossFns.

`table.py` lists them with equation, source and limits; docs/preference.md is made from it.
"""

from jaxllm.losses.preference.builders import (
    combined,
    loss,
    pair_logps,
    sequence_logps,
    token_logps,
    token_mean,
)
from jaxllm.losses.preference.divergence import alpha_divergence, forward_kl, jensen_shannon, reverse_kl
from jaxllm.losses.preference.free import alphapo, cpo, orpo, preferred_ft, reference_free, simpo, unlikelihood
from jaxllm.losses.preference.pairs import (
    PairLogps,
    aot,
    aot_unpaired,
    apo_down,
    apo_zero,
    bco_pair,
    cdpo,
    discopop,
    dpo,
    dpo_norm,
    exo_pair,
    hinge,
    ipo,
    log_ratio_margin,
    log_ratios,
    nca_pair,
    robust,
    sppo_hard,
)
from jaxllm.losses.preference.tokens import ld_dpo, token_unlikelihood, wpo
from jaxllm.losses.preference.unpaired import RowLogps, apo_zero_unpaired, bco, kto, row_loss

__all__ = [
    "PairLogps", "RowLogps", "alpha_divergence", "alphapo", "aot", "aot_unpaired", "apo_down", "apo_zero", "apo_zero_unpaired",
    "bco", "bco_pair", "cdpo", "combined", "cpo", "discopop", "dpo", "dpo_norm", "exo_pair", "forward_kl", "hinge", "ipo",
    "jensen_shannon", "kto", "ld_dpo", "log_ratio_margin", "log_ratios", "loss", "nca_pair", "orpo", "pair_logps",
    "preferred_ft", "reference_free", "reverse_kl", "robust", "row_loss", "sequence_logps", "simpo", "sppo_hard", "token_logps",
    "token_mean", "token_unlikelihood", "unlikelihood", "wpo",
]  # fmt: skip
