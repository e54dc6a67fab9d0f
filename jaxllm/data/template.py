"""The chat template, in Jinja as Hugging Face tools read it; `chat` says the same in token ids, and a test compares them."""

from __future__ import annotations

from collections.abc import Mapping

ROLES = ("system", "user", "assistant")

# Every turn is <|role|>CONTENT<|end|>; what the assistant says, its end token included, is what is trained.
WITH_ROLES = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}<|assistant|>{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% else %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# A tokenizer without role tokens: markers in plain text, and the end of text ends the assistant's turn.
PLAIN = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}Assistant:\n{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.role | capitalize }}:\n{{ m.content }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)


def has_roles(specials: Mapping[str, int]) -> bool:
    """Whether a tokenizer's specials hold the role tokens and the end token."""
    return all(name in specials for name in (*ROLES, "end"))


def template_text(specials: Mapping[str, int]) -> str:
    """The template that fits a tokenizer's specials."""
    opening = "{{ bos_token }}" if "bos" in specials else ""
    return opening + (WITH_ROLES if has_roles(specials) else PLAIN)
