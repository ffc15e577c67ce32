"""Arcee's AFM: a Llama without a gate, its activation ReLU squared, often with YaRN."""

from sparse_lm.convert.family import Family, Fields


def _no_gate(fields: Fields) -> bool:
    return False


ARCEE = Family("arcee", "ArceeForCausalLM", gated=_no_gate)
