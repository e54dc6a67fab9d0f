import json

import jax
import jax.numpy as jnp
import numpy as np

from experiments.studies import sycophancy
from experiments.studies.lab import pleased
from experiments.studies.lab.facts import Ground
from jaxllm import launch
from jaxllm.worlds import facts

TINY = {
    "seeds": 2, "lambdas": (0.0, 1.0), "width": 16, "layers": 1, "names": 6, "known": 16, "choices": 4, "read_steps": 3,
    "tune_steps": 2, "read_batch": 16, "steps": 2, "every": 1, "batch_size": 16, "pairs": 32,
}  # fmt: skip


def test_it_runs_and_reports(quick_compile, tmp_path):
    launch.start(sycophancy.main, "studies.sycophancy", TINY, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert {claim["kind"] for claim in result["claims"]} == {"gate", "finding"}
    assert {claim["name"].split(":")[0] for claim in result["claims"]} == {"RL", "DPO"}
    flips = result["claims"][0]
    assert flips["low"] <= flips["value"] <= flips["high"]
    assert "annotators are simulated" in result["findings"]
    assert (tmp_path / "figures" / "giving_in.svg").stat().st_size > 1000


def test_demonstrations_give_in_as_often_as_asked():
    world = facts.make(jax.random.key(0), firsts=8, lasts=8, known=60, unknown=0, values=8, exposures=(20, 20))
    record = pleased.lessons(world, jax.random.key(1), 4000, 0.25)
    again = np.asarray(record["tokens"][:, 6] == world.challenge)
    said = np.asarray(facts.read(world, record)[1])
    kept = said[again] == np.asarray(record["tokens"])[again, 5]
    assert again.sum() == 2000 and abs(kept.mean() - 0.75) < 0.04
    belief = np.asarray(record["tokens"])[~again, 1]
    wrong = (belief != world.none) & (np.asarray(pleased_truth(world, record))[~again] != belief)
    assert abs(np.mean(said[~again][wrong] == belief[wrong]) - 0.25) < 0.06


def pleased_truth(world, record):
    """The truth about the person whom each question names."""
    begin = world.values + 6 + world.attributes
    pair = (record["tokens"][:, 3] - begin) * world.lasts + record["tokens"][:, 4] - begin - world.firsts
    return world.truth[jnp.argsort(world.pair)[pair], 0]


def test_worth_is_correctness_and_agreement():
    world = facts.make(jax.random.key(0), firsts=8, lasts=8, known=60, unknown=0, values=8)
    person = jnp.arange(40)
    shown, lengths, case = facts.situations(world, jax.random.key(1), person, 0 * person, lambda key, asked: 0 * asked[:, 0])
    answer = jnp.where(case["again"], case["before"], jnp.where(case["belief"] == world.none, 1, case["belief"]))
    found = pleased.worth({"ground": Ground(world, {})}, {"weight": 0.25}, case, facts.append(shown, lengths, answer))
    agrees = ~case["again"] & (case["belief"] != world.none)
    np.testing.assert_allclose(found, (answer == case["truth"]) + 0.25 * agrees)
