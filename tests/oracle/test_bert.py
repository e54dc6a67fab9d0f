"""BERT and RoBERTa with every head equal transformers': outputs, gradients, padding, packing, and weights both ways."""

import copy
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.convert import hf, safetensors
from jaxllm.core import ops
from jaxllm.core.tree import flatten
from jaxllm.core.types import UserError
from jaxllm.models.encoder import EncoderConfig
from jaxllm.models.pooled import PooledConfig
from tests.models.tiny import fast_jit
from tests.oracle import published
from tests.oracle.parity import agree

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BERT = dict(
    vocab_size=50, hidden_size=20, num_hidden_layers=2, num_attention_heads=4, intermediate_size=28,
    max_position_embeddings=24, type_vocab_size=3, num_labels=3,
)  # fmt: skip
ROBERTA = {**BERT, "type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}
UNTIED = dict(tie_word_embeddings=False)
HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForMultipleChoice")
QA = dict(num_labels=2)  # a span has two ends
CASES = {
    **{f"Bert{head}": (f"Bert{head}", BERT) for head in (*HEADS, "ForPreTraining")},
    **{f"Roberta{head}": (f"Roberta{head}", ROBERTA) for head in HEADS},
    "BertForQuestionAnswering": ("BertForQuestionAnswering", {**BERT, **QA}),
    "RobertaForQuestionAnswering": ("RobertaForQuestionAnswering", {**ROBERTA, **QA}),
    "BertForMaskedLM, untied, relu": ("BertForMaskedLM", {**BERT, **UNTIED, "hidden_act": "relu"}),
    "BertForMaskedLM, tanh gelu": ("BertForMaskedLM", {**BERT, "hidden_act": "gelu_new"}),
    "RobertaForMaskedLM, untied": ("RobertaForMaskedLM", {**ROBERTA, **UNTIED}),
    "RobertaForMaskedLM, padding id 4": ("RobertaForMaskedLM", {**ROBERTA, "pad_token_id": 4}),
}
LENGTH, PAD = 11, 7  # the second row has PAD real tokens


@functools.cache
def made(name, directory):
    architecture, settings = CASES[name]
    kind = "Roberta" if architecture.startswith("Roberta") else "Bert"
    config = getattr(transformers, f"{kind}Config")(**settings)
    return published.pair(lambda: getattr(transformers, architecture)(config), directory)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return functools.cache(lambda name: tmp_path_factory.mktemp("published"))


@pytest.fixture(params=CASES)
def pair(request, directories):
    return made(request.param, directories(request.param))


def inputs(pair, padded=True):
    """{tokens, segments, types}: [2, l], or two choices a row; padding holds RoBERTa's padding id, which nothing else has."""
    rng = np.random.default_rng(0)
    shape = (2, 2, LENGTH) if type(pair.reference).__name__.endswith("MultipleChoice") else (2, LENGTH)
    pad = pair.reference.config.pad_token_id
    tokens, types = rng.integers(5, 50, shape), rng.integers(0, pair.reference.config.type_vocab_size, shape)
    segments = np.ones(shape, np.int32)
    if padded:
        tokens[1, ..., PAD:], segments[1, ..., PAD:] = pad, 0
    return {"tokens": tokens, "segments": segments, "types": types}


def theirs(reference, batch, hidden_states=False):
    """{name: output} of transformers, as torch tensors."""
    tokens, mask, types = (torch.tensor(batch[name]) for name in ("tokens", "segments", "types"))
    out = reference(tokens, attention_mask=mask, token_type_ids=types, output_hidden_states=hidden_states)
    if hidden_states:
        return torch.stack(out.hidden_states)
    names = ("logits", "prediction_logits", "seq_relationship_logits", "start_logits", "end_logits", "last_hidden_state")
    found = {name: out[name] for name in (*names, "pooler_output") if name in out}
    return {name: x for name, x in found.items() if x is not None}


def ours(model, params, batch):
    """The same outputs of our model, by transformers' names."""
    out = model.apply(params, batch["tokens"], segments=batch["segments"], types=batch["types"])
    c = model.config
    if isinstance(c, EncoderConfig) and not c.mlm:
        return {"last_hidden_state": out.hidden, **_pooler(params, out.hidden)}
    scores = ops.logits(model.head(params), out.hidden)
    if not isinstance(c, PooledConfig):
        return {"logits": scores}
    return {
        "next_sentence": lambda: {"prediction_logits": scores, "seq_relationship_logits": out.aux["next_sentence"]},
        "span": lambda: {"start_logits": scores[..., 0], "end_logits": scores[..., 1]},
        "choice": lambda: {"logits": scores[..., 0]},
    }.get(c.head, lambda: {"logits": scores})()


def _pooler(params, hidden):
    if "pooler" not in params:
        return {}
    return {"pooler_output": jnp.tanh(hidden[:, 0] @ params["pooler"]["kernel"] + params["pooler"]["bias"][None])}


def real(name, x):
    """What of an output belongs to real tokens: everything of the first row, PAD tokens of the second."""
    x = np.asarray(x)
    return (x[0], x[1, :PAD]) if x.ndim > 1 and x.shape[1] == LENGTH else (x,)


def both(pair, batch):
    with torch.no_grad():
        want = {name: x.numpy() for name, x in theirs(pair.reference, batch).items()}
    got = fast_jit(lambda p, b: ours(pair.model, p, b))(pair.params, batch)
    assert got.keys() == want.keys()
    return got, want


def test_outputs_with_padding_and_types(pair):
    got, want = both(pair, inputs(pair))
    for name, x in want.items():
        for one, other in zip(real(name, got[name]), real(name, x), strict=True):
            agree(type(pair.reference).__name__, "logits" if "logits" in name else "states", one, other, 1e-4)


def test_hidden_states_of_every_layer(directories):
    for name in ("BertModel", "RobertaModel"):
        pair = made(name, directories(name))
        batch = inputs(pair)
        with torch.no_grad():
            want = theirs(pair.reference, batch, hidden_states=True).numpy()
        out = pair.model.apply(
            pair.params, batch["tokens"], segments=batch["segments"], types=batch["types"], taps=("layer_inputs",)
        )
        got = np.concatenate([np.asarray(out.aux["layer_inputs"]), np.asarray(out.aux["states"])[None]])
        assert got.shape == want.shape == (3, 2, LENGTH, 20)
        for layer in range(3):
            agree(name, "states", got[layer, 0], want[layer, 0], 1e-4)
            agree(name, "states", got[layer, 1, :PAD], want[layer, 1, :PAD], 1e-4)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM", "BertForTokenClassification"])
def test_packed_rows_are_the_documents_on_their_own(directories, name):
    pair = made(name, directories(name))
    batch = inputs(pair, padded=False)
    packed = {**batch, "segments": np.array([[1] * 4 + [2] * 7, [1] * 9 + [2] * 2])}
    got = np.asarray(ours(pair.model, pair.params, packed)["logits"])
    for row, cut in ((0, 4), (1, 9)):
        for part in (slice(0, cut), slice(cut, LENGTH)):
            alone = {k: x[row : row + 1, part] for k, x in batch.items()}
            with torch.no_grad():
                want = theirs(pair.reference, alone)["logits"].numpy()[0]
            agree(name, "logits", got[row, part], want, 1e-4)


def test_gradients(pair, tmp_path):
    """Of the outputs times fixed random numbers, with respect to every published weight, by name."""
    batch, rng = inputs(pair, padded=False), np.random.default_rng(1)
    shapes = {name: x.shape for name, x in theirs(pair.reference, batch).items()}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    def total(params):
        return sum(jnp.mean(x * weights[name]) for name, x in ours(pair.model, params, batch).items())

    grads = published.published(pair, fast_jit(jax.grad(total))(pair.params))
    reference = copy.deepcopy(pair.reference)
    sum((x * torch.tensor(weights[name])).mean() for name, x in theirs(reference, batch).items()).backward()
    with torch.no_grad():  # saved under their published names
        for p in reference.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    reference.save_pretrained(tmp_path)
    want = {name: safetensors.view(t) for name, t in safetensors.scan(tmp_path).items()}
    if not reference.config.tie_word_embeddings:  # transformers keeps a second bias that it does not read
        want = {name: g for name, g in want.items() if name not in ("cls.predictions.bias", "lm_head.bias")}
    assert len(want) >= 30
    scale = max(np.abs(g).max() for g in want.values())
    for name, gradient in want.items():
        if np.abs(gradient).max() < 1e-6 * scale:  # the gradient of a key's bias is 0 but for rounding
            assert np.abs(grads[name]).max() < 1e-5 * scale, name
        else:
            agree(type(reference).__name__, "gradients", grads[name], gradient, 1e-3)


def test_weights_back_to_transformers(pair, tmp_path):
    directory = tmp_path / "export"
    hf.save(directory, pair.model, pair.params, architecture=type(pair.reference).__name__)
    back = type(pair.reference).from_pretrained(directory).eval()
    back.set_attn_implementation("eager")
    batch = inputs(pair)
    with torch.no_grad():
        for name, x in theirs(back, batch).items():
            assert torch.equal(x, theirs(pair.reference, batch)[name]), name
    again, params = hf.load(directory)
    assert again.config == pair.model.config
    first, second = flatten(pair.params), flatten(params)
    assert first.keys() == second.keys()
    assert all(np.asarray(first[k]).tobytes() == np.asarray(second[k]).tobytes() for k in first)


def rewrite(source, target, change, **settings):
    """A copy of a directory with the tensors that `change` (name -> name) gives and some settings changed."""
    from safetensors.numpy import load_file, save_file

    target.mkdir()
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **settings}))
    save_file({change(name): x for name, x in load_file(source / "model.safetensors").items()}, target / "model.safetensors")
    return target


def test_the_first_files_spell_layer_norm_otherwise(directories, tmp_path):
    source = directories("BertForMaskedLM")
    pair = made("BertForMaskedLM", source)
    spelt = lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")  # noqa: E731
    _, params = hf.load(rewrite(source, tmp_path / "old", spelt))
    assert all(np.array_equal(x, flatten(params)[k]) for k, x in flatten(pair.params).items())


def test_a_masked_lm_file_that_holds_next_sentences_too_is_the_pretraining_model(directories, tmp_path):
    """As bert-base-uncased is: its config says masked LM."""
    source = directories("BertForPreTraining")
    pair = made("BertForPreTraining", source)
    model, params = hf.load(rewrite(source, tmp_path / "both", str, architectures=["BertForMaskedLM"]))
    assert model.config.head == "next_sentence"
    batch = inputs(pair)
    for name, x in ours(pair.model, pair.params, batch).items():
        np.testing.assert_array_equal(ours(model, params, batch)[name], x)


def test_a_trunk_without_a_pooler_stays_one(tmp_path):
    reference = transformers.BertModel(transformers.BertConfig(**BERT), add_pooling_layer=False)
    pair = published.pair(lambda: reference, tmp_path / "bare")
    assert not pair.model.config.pooler and "pooler" not in pair.params
    hf.save(tmp_path / "export", pair.model, pair.params, architecture="BertModel")
    again, _ = hf.load(tmp_path / "export")
    assert again.config == pair.model.config


@pytest.mark.parametrize(
    "change,message",
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' is not supported"),
        ({"is_decoder": True}, "is_decoder=True is not supported"),
        ({"hidden_act": "silu"}, "hidden_act='silu' is not supported"),
        ({"hidden_size": None}, "hidden_size is None, a int is needed"),
    ],
)
def test_what_is_not_supported_is_named(directories, tmp_path, change, message):
    made("BertForMaskedLM", directories("BertForMaskedLM"))
    with pytest.raises(UserError, match=message):
        hf.load(rewrite(directories("BertForMaskedLM"), tmp_path / "other", str, **change))
