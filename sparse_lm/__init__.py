"""Flax NNX modules of sparse language models: the drop-in feed-forward layer and the decoder around it."""

from sparse_lm.config import ModelConfig, SparsityConfig
from sparse_lm.ffn import SparseFFN
from sparse_lm.layer_plan import LayerPlan
from sparse_lm.model import SparseLM

__all__ = ["LayerPlan", "ModelConfig", "SparseFFN", "SparseLM", "SparsityConfig"]
