"""Six preference losses on one world: label noise, few and many pairs, four values of each loss's own strength."""

import ml_collections


def get_config(variant=None):
    c = ml_collections.ConfigDict()
    full = variant == "full"
    c.seed = 0
    c.seeds = 10 if full else 3
    c.length = 32 if full else 12  # words of a string; where it may end, at most
    c.stop = 0.1 if full else 0.2  # the source's chance to end after each further word, where it may end
    c.shortest = 10 if full else 6  # words before which the source does not end there; judged by the first shortest - 2
    c.width = 128 if full else 24
    c.layers = 4 if full else 1
    c.pretrain_steps = 2000 if full else 300
    c.few = 300
    c.many = 3000
    c.noise = (0.0, 0.1, 0.3)  # how many labels are flipped, on top of an exact order by gold
    c.bias = 0.3  # of the annotator taken in by length, for the data on which lengths are compared
    c.sharpness = 2.0  # of the annotators that are not exact: Bradley-Terry on this times the gap in worth
    c.steps = 400 if full else 60
    c.batch_size = 64 if full else 32
    c.lr = 5e-4 if full else 2e-3
    c.betas = {
        "dpo": (0.03, 0.1, 0.3, 1.0),
        "cdpo": (0.03, 0.1, 0.3, 1.0),
        "ipo": (0.1, 0.3, 1.0, 3.0),  # per token: 1 / (2 beta) is the target of a token's margin
        "kto": (0.03, 0.1, 0.3, 1.0),
        "simpo": (0.3, 1.0, 3.0, 10.0),  # per token
        "reference_free": (0.03, 0.1, 0.3, 1.0),
    }
    c.test_strings = 2048 if full else 256
    c.votes = 256  # of the annotator, which choose among the four values
    c.at_once = 1 if full else 3  # losses in one program: its runs share a machine's memory
    c.bandit_steps = 20_000
    return c
