"""lm-eval's numbers are ours: log-likelihoods, accuracy and completions on the same strings."""

import json

import numpy as np
import pytest

from experiments import lm_eval as command
from jaxllm import launch
from jaxllm.core.types import UserError
from jaxllm.data.text import read_rows
from jaxllm.train.compiled import programs
from tests.conftest import shared_data
from tests.experiments.simple import generated, scored
from tests.models.tiny import weights

N = 40  # pairs of a paradigm


@pytest.fixture(scope="module")
def loaded(base):
    """The tiny run's base model, with weights that tell sentences apart."""
    loaded = launch.load(base / "pretrain")
    return loaded._replace(params={"policy": weights(loaded.model.specs, seed=4)})


@pytest.fixture(scope="module")
def lm(loaded):
    pytest.importorskip("lm_eval")
    from experiments.lm_eval_adapter import JaxLM

    return JaxLM(loaded, batch_size=8, slots=3)


def requests(*arguments):
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, args, i) for i, args in enumerate(arguments)]


def ours(loaded, context, continuation):
    """The log-likelihood of ids behind others, and whether greedy decoding would say them."""
    logps, best = scored(loaded, context, continuation)
    return float(logps.sum()), bool(best.all())


def test_blimp_has_our_log_likelihoods_and_our_accuracy(lm, loaded):
    path = shared_data("eval/blimp/anaphor_gender_agreement.jsonl.gz")
    (task,) = command.chosen("blimp_anaphor_gender_agreement", str(path.parent))
    results = command.evaluate(lm, [task], N, samples=True)
    eos, encode = loaded.tokenizer.specials["eos"], loaded.tokenizer.encode
    right = []
    for row, sample in zip(read_rows(path)[:N], results["samples"]["blimp_anaphor_gender_agreement"], strict=True):
        pair = [ours(loaded, [eos], encode(row[name]))[0] for name in ("sentence_good", "sentence_bad")]
        got = [float(r[0]) if not isinstance(r[0], tuple) else r[0][0] for r in sample["filtered_resps"]]
        np.testing.assert_allclose(got, pair, rtol=0, atol=1e-5 * max(map(abs, pair)))
        right.append(pair[0] > pair[1])
    accuracy = results["results"]["blimp_anaphor_gender_agreement"]["acc,none"]
    assert accuracy == np.mean(right) and 0 < accuracy < 1
    (line,) = command.table(results)
    assert line.split()[:2] == ["blimp_anaphor_gender_agreement", "acc"] and f"{accuracy:.4f}" in line and "±" in line


def test_contexts_are_conditions_and_the_most_likely_are_said_so(lm, loaded):
    encode = loaded.tokenizer.encode
    first = encode("the cat")
    _, greedy = generated(loaded, first, 3)
    pairs = [(first, greedy), (first, encode(" sat")), (encode("a dog ran over the"), encode(" hill to the sea")), ([257], first)]
    got = lm._loglikelihood_tokens([(("", ""), *pair) for pair in pairs])
    wanted = [ours(loaded, *pair) for pair in pairs]
    np.testing.assert_allclose([x for x, _ in got], [x for x, _ in wanted], atol=1e-4)
    assert [g for _, g in got] == [g for _, g in wanted] == [True, False, False, False]
    text = lm.loglikelihood(requests(("the cat", " sat"), ("", "the cat")), disable_tqdm=True)
    np.testing.assert_allclose([x for x, _ in text], [got[1][0], ours(loaded, [257], first)[0]], atol=1e-4)


def test_long_texts_are_scored_in_windows_and_long_contexts_lose_their_beginning(lm, loaded):
    text = "rain fell on the old town all day and she read a book " * 4
    ids, eos = loaded.tokenizer.encode(text), loaded.tokenizer.specials["eos"]
    assert len(ids) > 2 * 96
    whole, short, none = lm.loglikelihood_rolling(requests((text,), ("the cat",), ("",)))
    windows = [([eos], ids[:96]), (ids[95:96], ids[96:192]), (ids[-97:192], ids[192:])]
    wanted = sum(ours(loaded, context, said)[0] for context, said in windows)
    np.testing.assert_allclose(whole, wanted, rtol=1e-5)
    np.testing.assert_allclose(short, ours(loaded, [eos], loaded.tokenizer.encode("the cat"))[0], atol=1e-4)
    assert none == 0
    ((cut, _),) = lm._loglikelihood_tokens([(("", ""), ids[:150], ids[150:160])])
    np.testing.assert_allclose(cut, ours(loaded, ids[63:150], ids[150:160])[0], rtol=1e-5)
    with pytest.raises(UserError, match="has 97 tokens: the model scores 1 to 96"):
        lm._loglikelihood_tokens([(("", ""), [eos], ids[:97])])


def test_completions_are_generated_ones_up_to_their_stop(lm, loaded):
    texts = ["the cat", "a dog ran over the hill", "x" * 90]
    prompts = [loaded.tokenizer.encode(text)[-(96 - 10) :] for text in texts]
    plain = [generated(loaded, prompt, 10)[0] for prompt in prompts]
    settings = {"until": [], "max_gen_toks": 10, "do_sample": False, "temperature": 0.7}
    assert lm.generate_until(requests(*((t, settings) for t in texts))) == plain and len(set(plain)) == 3
    stop = plain[0][3:5]
    (cut,) = lm.generate_until(requests((texts[0], {**settings, "until": [stop]})))
    assert cut == plain[0][: plain[0].index(stop)]
    with pytest.raises(UserError, match="generation_kwargs.num_beams is not offered"):
        lm.generate_until(requests((texts[0], {"num_beams": 4})))


def test_requests_of_other_lengths_compile_nothing_new(lm):
    def ask(n):
        lm.loglikelihood(requests(*(("", "z" * (1 + i % n)) for i in range(n))), disable_tqdm=True)

    ask(95)
    before = len(programs())
    for n in (1, 7, 50, 80):
        ask(n)
    assert [name for _, name in programs()[before:] if "score" in name] == [] and any("score" in name for _, name in programs())


def test_a_yaml_task_of_the_users(lm, tmp_path):
    rows = [{"q": f"say {w}", "a": w} for w in ("cat", "dog")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = tmp_path / "mine.yaml"
    task.write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: " + str(tmp_path / "rows.jsonl") + "\n"
        'output_type: generate_until\ntest_split: test\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\n'
        'generation_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 4\nmetric_list:\n  - metric: exact_match\n'
    )
    results = command.evaluate(lm, command.chosen(str(task), ""))
    assert results["results"]["mine"]["exact_match,none"] == 0.0 and results["n-samples"]["mine"]["effective"] == 2


def test_what_is_not_there_is_named(tmp_path):
    for tasks, blimp, words in (
        ("", "", "--tasks names nothing"), ("nowhere.yaml", "", "nowhere.yaml: no such file"),
        ("blimp", str(tmp_path / "no"), "no such directory"), ("blimp_x", str(tmp_path), "no file for blimp_x"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            command.chosen(tasks, blimp)
    (tmp_path / "out.json").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        command.main("latest", "", "x", "", 0, 8, str(tmp_path / "out.json"))
    assert (tmp_path / "out.json").read_text() == "mine"
