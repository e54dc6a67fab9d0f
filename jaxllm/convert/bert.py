"""BERT and RoBERTa with their heads, as transformers names them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

from jaxllm.convert.names import Family, Leaf, choose, embedding, leaf, linear, need, norm, only, vector
from jaxllm.core.types import UserError
from jaxllm.models import families
from jaxllm.models.encoder import EncoderConfig
from jaxllm.models.pooled import PooledConfig

Config = EncoderConfig | PooledConfig
ACTS = {"gelu": "gelu_exact", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu"}
# LayerNorm's parameters had TensorFlow's names in the first files
RENAMES = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
BUFFERS = r"(?:\w+\.)?embeddings\.(?:position|token_type)_ids"


class Names(NamedTuple):
    """Where a model_type puts things: trunk, transform (dense), its norm, head (bias), and decoder of the masked-LM head."""

    trunk: str
    dense: str
    norm: str
    head: str
    decoder: str


NAMES = {
    "bert": Names(
        "bert", "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions",
        "cls.predictions.decoder",
    ),
    "roberta": Names("roberta", "lm_head.dense", "lm_head.layer_norm", "lm_head", "lm_head.decoder"),
}  # fmt: skip


class Kind(NamedTuple):
    """An architecture: prefix of the trunk's names; head: a key of pooled.HEADS or None; names of pooler and classifier."""

    model_type: str
    prefix: str
    head: str | None
    mlm: bool
    pooler: str  # "": there is none
    classifier: str = ""


# ---- config.json


def read_trunk(published: dict, kind: Kind) -> EncoderConfig:
    """The encoder of a config.json. UserError naming what is not supported."""
    only(published, position_embedding_type=("absolute", None), is_decoder=(False, None), add_cross_attention=(False, None))
    if kind.model_type == "roberta":  # its masked-LM head has this one whatever the layers have
        only(published, hidden_act=("gelu", None))
    offset = need(published, "pad_token_id") + 1 if kind.model_type == "roberta" else 0
    pooler = bool(kind.pooler) and (kind.head is not None or published.get("add_pooling_layer", True))
    return EncoderConfig(
        need(published, "vocab_size"), max_length=need(published, "max_position_embeddings") - offset,
        d_model=need(published, "hidden_size"), n_layers=need(published, "num_hidden_layers"),
        n_heads=need(published, "num_attention_heads"), d_ff=need(published, "intermediate_size"),
        n_types=need(published, "type_vocab_size"), position_offset=offset,
        activation=choose(published, "hidden_act", ACTS, "gelu"), norm_eps=need(published, "layer_norm_eps", float),
        mlm=kind.mlm, tied=bool(published.get("tie_word_embeddings", True)) or not kind.mlm, pooler=pooler,
    )  # fmt: skip


def write_trunk(c: EncoderConfig, kind: Kind) -> dict[str, Any]:
    """The inverse. UserError when this model_type cannot hold the config."""
    if (c.position_offset > 0) != (kind.model_type == "roberta"):
        raise UserError(f"position_offset={c.position_offset} is not {kind.model_type}'s")
    acts = [word for word, ours in ACTS.items() if ours == c.activation]
    if not acts:
        raise UserError(f"activation {c.activation!r} is none of {', '.join(ACTS.values())}")
    out = {
        "vocab_size": c.vocab_size, "max_position_embeddings": c.max_length + c.position_offset, "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads, "intermediate_size": c.d_ff,
        "type_vocab_size": c.n_types, "hidden_act": acts[0], "layer_norm_eps": c.norm_eps, "tie_word_embeddings": c.tied,
        "position_embedding_type": "absolute",
    }  # fmt: skip
    if c.position_offset:
        out["pad_token_id"] = c.position_offset - 1
    if kind.head is None and kind.pooler and not c.pooler:
        out["add_pooling_layer"] = False  # ours: transformers makes one that nobody reads
    return out


def read(published: dict, kind: Kind) -> Config:
    """config.json -> our config, with its head."""
    trunk = read_trunk(published, kind)
    if kind.head is None:
        return trunk
    fixed = {"next_sentence": 2, "span": 2, "choice": 1}
    given = len(published.get("id2label") or published.get("label2id") or ()) or published.get("num_labels") or 2
    return PooledConfig(families.to_dict(trunk), kind.head, fixed.get(kind.head, int(given)))


def write(c: Config, kind: Kind) -> dict[str, Any]:
    """The inverse."""
    if kind.head is None:
        return write_trunk(c, kind)
    if c.trunk["family"] != "encoder":
        raise UserError(f"its trunk is no encoder but a {c.trunk['family']}")
    labels = {str(i): f"LABEL_{i}" for i in range(c.n_labels)}
    return {
        **write_trunk(families.from_dict(c.trunk), kind),
        "id2label": labels,
        "label2id": {name: int(i) for i, name in labels.items()},
    }


# ---- tensors


def leaves(c: Config, kind: Kind) -> list[Leaf]:
    """The table of an architecture."""
    trunk = families.from_dict(c.trunk) if isinstance(c, PooledConfig) else c
    out = embeddings(kind.prefix) + layers(trunk, kind.prefix)
    if trunk.pooler:
        out += linear("pooler", kind.pooler, bias=True)
    if trunk.mlm:
        out += masked_lm(trunk, NAMES[kind.model_type])
    if isinstance(c, PooledConfig):
        out += linear("classifier", kind.classifier, bias=True)
    return out


def embeddings(prefix: str) -> list[Leaf]:
    """Tokens, positions, types and the norm over their sum."""
    at = f"{prefix}embeddings"
    return [
        embedding("embed/tokens", f"{at}.word_embeddings"),
        embedding("embed/positions", f"{at}.position_embeddings"),
        embedding("embed/types", f"{at}.token_type_embeddings"),
        *norm("embed/norm", f"{at}.LayerNorm", bias=True),
    ]


def layers(c: EncoderConfig, prefix: str) -> list[Leaf]:
    """The stack."""
    at, heads = f"{prefix}encoder.layer.{{i}}", (c.n_heads, c.d_model // c.n_heads)
    out = [
        one
        for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value"))
        for one in linear(f"layers/attention/{ours}", f"{at}.attention.self.{theirs}", out=heads, bias=True)
    ]
    return [
        *out,
        *linear("layers/attention/o", f"{at}.attention.output.dense", inp=heads, bias=True),
        *norm("layers/attention_norm", f"{at}.attention.output.LayerNorm", bias=True),
        *linear("layers/ffn/up", f"{at}.intermediate.dense", bias=True),
        *linear("layers/ffn/down", f"{at}.output.dense", bias=True),
        *norm("layers/ffn_norm", f"{at}.output.LayerNorm", bias=True),
    ]


def masked_lm(c: EncoderConfig, names: Names) -> list[Leaf]:
    """Transform and head; where the head is not the embedding, transformers holds its bias under two names and reads one."""
    out = linear("transform/dense", names.dense, bias=True) + norm("transform/norm", names.norm, bias=True)
    if c.tied:
        return out + vector("head/bias", f"{names.head}.bias")
    both = (f"{names.decoder}.bias", f"{names.head}.bias")
    bias = Leaf(("head/bias",), both, lambda t: [t[0]], lambda a: [a[0], a[0]])
    return [*out, leaf("head/kernel", f"{names.decoder}.weight", lambda t: t.T, lambda a: a.T), bias]


# ---- what the files decide


def with_their_pooler(c: Config, names: Iterable[str]) -> Config:
    """A bare trunk has a pooler when its file has one."""
    return dataclasses.replace(c, pooler=any("pooler.dense" in name for name in names))


def with_their_next_sentence(c: Config, names: Iterable[str]) -> Config:
    """BERT's first files say masked LM and hold the next-sentence layer and the pooler too: then they are pretraining's."""
    if {"cls.seq_relationship.weight", "bert.pooler.dense.weight"} <= set(names):
        return PooledConfig(families.to_dict(dataclasses.replace(c, pooler=True)), "next_sentence")
    return c


# ---- the architectures

HEAD_TWICE = r"cls\.predictions\.decoder\.(?:weight|bias)|lm_head\.decoder\.(?:weight|bias)"  # the embedding and a bias, again
PRETRAINING = Kind("bert", "bert.", "next_sentence", True, "bert.pooler.dense", "cls.seq_relationship")


def _family(architecture: str, kind: Kind, ignored: str = r"(?!)", renames: tuple = (), **more: Any) -> Family:
    return Family(
        architecture, kind.model_type, EncoderConfig if kind.head is None else PooledConfig,
        config=lambda published: read(published, kind), to_config=lambda c: write(c, kind),
        ignored=f"{BUFFERS}|{ignored}", renames=(*RENAMES, *renames), **{"leaves": lambda c: leaves(c, kind), **more},
    )  # fmt: skip


def _masked_lm(architecture: str, model_type: str) -> Family:
    kind = Kind(model_type, f"{model_type}.", None, True, "")
    return _family(
        architecture, kind, rf"{HEAD_TWICE}|{model_type}\.pooler\..*|cls\.seq_relationship\..*",
        adjust=with_their_next_sentence, leaves=lambda c: leaves(c, PRETRAINING if isinstance(c, PooledConfig) else kind),
    )  # fmt: skip


def _model(architecture: str, model_type: str) -> Family:
    kind = Kind(model_type, "", None, False, "pooler.dense")
    return _family(architecture, kind, r"cls\..*|lm_head\..*", ((rf"^{model_type}\.", ""),), adjust=with_their_pooler)


def _heads(name: str, model_type: str, sequence_pooler: str, sequence_classifier: str) -> tuple[Family, ...]:
    trunk, pooler = f"{model_type}.", rf"{model_type}\.pooler\..*"
    kinds = {
        "SequenceClassification": Kind(model_type, trunk, "sequence", False, sequence_pooler, sequence_classifier),
        "TokenClassification": Kind(model_type, trunk, "token", False, "", "classifier"),
        "QuestionAnswering": Kind(model_type, trunk, "span", False, "", "qa_outputs"),
        "MultipleChoice": Kind(model_type, trunk, "choice", False, f"{trunk}pooler.dense", "classifier"),
    }
    return tuple(_family(f"{name}For{what}", kind, r"(?!)" if kind.pooler else pooler) for what, kind in kinds.items())


FAMILIES: tuple[Family, ...] = (
    _masked_lm("BertForMaskedLM", "bert"),
    _family("BertForPreTraining", PRETRAINING, HEAD_TWICE),
    _model("BertModel", "bert"),
    *_heads("Bert", "bert", "bert.pooler.dense", "classifier"),
    _masked_lm("RobertaForMaskedLM", "roberta"),
    _model("RobertaModel", "roberta"),
    *_heads("Roberta", "roberta", "classifier.dense", "classifier.out_proj"),
)
