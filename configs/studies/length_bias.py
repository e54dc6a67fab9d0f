"""Length bias: strings that end where the policy ends them, an annotator who is taken in by length, and three remedies."""

import ml_collections


def get_config(variant=None):
    c = ml_collections.ConfigDict()
    full = variant == "full"
    c.seed = 0
    c.seeds = 10 if full else 3
    c.length = 40 if full else 24  # words of a string at most
    c.shortest = 10 if full else 8  # words before which the source does not end; a string is judged by its first shortest - 2
    c.stop = 0.15 if full else 0.2  # the source's chance to end after each further word: about 1 / stop of them
    c.width = 128 if full else 32
    c.layers = 4 if full else 1
    c.pretrain_steps = 2000 if full else 300
    c.pairs = 5000 if full else 2000
    c.judge_steps = 600 if full else 300
    c.bias = 0.3  # the annotator's taste for length, in s.d. of worth for one s.d. of length
    c.sharpness = 2.0  # Bradley-Terry on this times the gap in what the annotator sees
    c.steps = 160 if full else 80
    c.every = 10
    c.batch_size = 256 if full else 48
    c.lr = 5e-4 if full else 1e-3
    c.kl_coef = 0.05
    c.high_kl_coef = 0.3
    c.target = 2.0  # the length-only reward's target, in mean lengths of the source's strings
    c.test_strings = 2048 if full else 384
    c.bin = 3  # words of a length bin
    return c
