"""Bamboo (arXiv 2406.05955): a Mistral with both sides of the gate rectified, dReLU."""

from sparse_lm.convert.family import Family, Fields


def _window(fields: Fields) -> int | None:
    return fields.get("sliding_window")


BAMBOO = Family("bamboo", "BambooForCausalLM", window=_window)
