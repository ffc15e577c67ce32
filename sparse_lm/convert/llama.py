"""Llama with a rectified gate, also ReluLLaMA (``model_type`` ``llama``, ``hidden_act`` ``relu``)."""

from sparse_lm.convert.family import Family

LLAMA = Family("llama", "LlamaForCausalLM")
