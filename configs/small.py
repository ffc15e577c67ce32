"""Twelve layers and 200 steps on the shipped speeches: enough to tell loss curves apart, minutes on a GPU.

Its micro-batch of 8,192 tokens is large enough for every sparse format, and an output head of its own keeps
the loss at its start near that of a uniform guess also with the initial weights of ``sparse-lm compare``.
"""

from pallas_kernels import FFNOptions
from sparse_lm import ModelConfig, SparsityConfig
from train.config import CheckpointConfig, DataConfig, OptimizerConfig, ReportConfig, TrainConfig

config = TrainConfig(
    steps=200,
    batch_size=32,
    workdir="runs/small",
    model=ModelConfig(
        vocab_size=2048,
        d_model=512,
        d_ff=2048,
        num_layers=12,
        num_heads=8,
        num_kv_heads=8,
        tied_embeddings=False,
        context_length=256,
        rope_theta=10_000.0,
        dtype="bfloat16",
        sparsity=SparsityConfig(l1=1e-3),
        ffn=FFNOptions(),
    ),
    data=DataConfig(tokenizer="bpe"),
    optimizer=OptimizerConfig(learning_rate=3e-4, final_fraction=0.05, warmup_steps=50),
    checkpoint=CheckpointConfig(every=100, keep=2),
    report=ReportConfig(every=10, evaluate_every=100, evaluate_tokens=65_536),
)
