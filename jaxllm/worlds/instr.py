"""A synthetic world of instructions with known truth: the whole life cycle at a size that trains in minutes.

Ordinary instructions (plain: 25 families over words, lists, numbers and short passages, and 4 held-out
ones), unsafe how-to requests and look-alike safe ones. It yields rows in the same schemas as files do.
Everybody in it is simulated: the web writers, the labelers of mixed habits who write demonstrations, the
annotator who compares.

Splits, disjoint by construction: train / tune / test by combination of arguments (80 / 10 / 10 %, sha256),
template (held-out paraphrases on test combinations), family (families that occur nowhere else). Documents,
demonstrations and preference prompts use the train split alone; tune on "tune", show claims on the others.

Everything depends on the seed alone, in every process and Python version.
"""

from jaxllm.worlds.instr_documents import document_rows, documents, raw_prompt
from jaxllm.worlds.instr_labelers import demonstrations
from jaxllm.worlds.instr_safety import REFUSALS, compliance
from jaxllm.worlds.instr_score import (
    annotate,
    filler_share,
    is_refusal,
    preference_probability,
    score,
    strip_filler,
)
from jaxllm.worlds.instr_tasks import FAMILIES, HELD_FAMILIES, MIXTURE, SPLITS, bucket, pair_tasks, tasks

__all__ = [
    "FAMILIES", "HELD_FAMILIES", "MIXTURE", "REFUSALS", "SPLITS", "annotate", "bucket", "compliance",
    "demonstrations", "document_rows", "documents", "filler_share", "is_refusal", "pair_tasks",
    "preference_probability", "raw_prompt", "score", "strip_filler", "tasks",
]  # fmt: skip
