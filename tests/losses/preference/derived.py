"""The preference losses once more, in numpy and float64, from the papers' own forms."""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def log_odds(x):
    return np.log(np.exp(x) / (1 - np.exp(x)))


class Pairs:
    """w, l: log-ratios; a, r: log-probabilities per token; t_w, t_l: probability ratios."""

    def __init__(self, p):
        self.p = p
        self.w, self.l = p.chosen - p.ref_chosen, p.rejected - p.ref_rejected
        self.h = self.w - self.l
        self.a, self.r = p.chosen / p.chosen_length, p.rejected / p.rejected_length
        self.t_w, self.t_l = np.exp(self.w), np.exp(self.l)


def logistic(x):
    return -np.log(sigmoid(x))


def exo(q, e):
    return q * np.log(q / (1 - e)) + (1 - q) * np.log((1 - q) / e)


def of_f(derivative):
    """-log sigmoid(beta (f'(t_w) - f'(t_l)))."""
    return lambda v, beta, **hyper: logistic(beta * (derivative(v.t_w, **hyper) - derivative(v.t_l, **hyper)))


def discopop(v, beta, tau):
    x = beta * v.h
    blend = sigmoid(x / tau)
    return (1 - blend) * np.log(1 + np.exp(-x)) + blend * np.exp(-x)


def aot(v, beta):
    policy, reference = v.p.chosen - v.p.rejected, v.p.ref_chosen - v.p.ref_rejected
    return logistic(beta * (np.sort(policy) - np.sort(reference)))


def alphapo(v, beta, gamma, alpha):
    reward = lambda p: beta * (1 - p**-alpha) / alpha  # noqa: E731
    return logistic(reward(np.exp(v.a)) - reward(np.exp(v.r)) - gamma)


LOSSES = {
    "dpo": lambda v, beta: logistic(beta * v.h),
    "dpo_norm": lambda v, beta: logistic(beta * (v.w / v.p.chosen_length - v.l / v.p.rejected_length)),
    "cdpo": lambda v, beta, label_smoothing: (
        (1 - label_smoothing) * logistic(beta * v.h) + label_smoothing * logistic(-beta * v.h)
    ),
    "robust": lambda v, beta, label_smoothing: (
        ((1 - label_smoothing) * logistic(beta * v.h) - label_smoothing * logistic(-beta * v.h)) / (1 - 2 * label_smoothing)
    ),
    "hinge": lambda v, beta: np.maximum(0, 1 - beta * v.h),
    "ipo": lambda v, beta: (v.w / v.p.chosen_length - v.l / v.p.rejected_length - 1 / (2 * beta)) ** 2,
    "exo_pair": lambda v, beta, label_smoothing: exo(sigmoid(beta * v.h), label_smoothing),
    "nca_pair": lambda v, beta: logistic(beta * v.w) + logistic(-beta * v.w) / 2 + logistic(-beta * v.l) / 2,
    "bco_pair": lambda v, beta: logistic(beta * v.w) + logistic(-beta * v.l),
    "sppo_hard": lambda v, beta: (v.w - 1 / (2 * beta)) ** 2 + (v.l + 1 / (2 * beta)) ** 2,
    "aot": aot,
    "aot_unpaired": lambda v, beta: logistic(beta * (np.sort(v.w) - np.sort(v.l))),
    "apo_zero": lambda v, beta: 1 - sigmoid(beta * v.w) + sigmoid(beta * v.l),
    "apo_down": lambda v, beta: sigmoid(beta * v.w) + 1 - sigmoid(beta * v.h),
    "discopop": discopop,
    "reverse_kl": of_f(lambda t: np.log(t) + 1),
    "forward_kl": of_f(lambda t: -1 / t),
    "jensen_shannon": of_f(lambda t: np.log(2 * t / (1 + t))),
    "alpha_divergence": of_f(lambda t, alpha: (1 - t**-alpha) / alpha),
    "reference_free": lambda v, beta: logistic(beta * (v.p.chosen - v.p.rejected)),
    "cpo": lambda v, beta: logistic(beta * (v.p.chosen - v.p.rejected)),
    "simpo": lambda v, beta, gamma: logistic(beta * v.a - beta * v.r - gamma),
    "alphapo": alphapo,
    "orpo": lambda v, beta: beta * logistic(log_odds(v.a) - log_odds(v.r)),
    "preferred_ft": lambda v: -v.a,
    "unlikelihood": lambda v, alpha: -v.a - alpha * np.log(1 - np.exp(v.r)),
}


def kto(x, label, kl, beta, desirable_weight=1.0, undesirable_weight=1.0):
    value = np.where(label, desirable_weight * sigmoid(beta * (x - kl)), undesirable_weight * sigmoid(beta * (kl - x)))
    return np.where(label, desirable_weight, undesirable_weight) - value


def bco(x, label, kl, beta):
    shift = (beta * x[label].mean() + beta * x[~label].mean()) / 2
    return np.where(label, logistic(beta * x - shift), logistic(shift - beta * x))


UNPAIRED = {"kto": kto, "bco": bco, "apo_zero_unpaired": lambda x, label, kl, beta: kto(x, label, 0.0, beta)}
