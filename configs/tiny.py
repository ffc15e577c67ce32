"""A small model of the shipped speeches that two CPU cores train in minutes.

So few steps need a stronger λ than the paper's 2e-5 to reach the same end: a few percent of active neurons at
no cost in held-out CE.
"""

from sparse_lm import ModelConfig, SparsityConfig
from train.config import CheckpointConfig, DataConfig, OptimizerConfig, ReportConfig, TrainConfig

config = TrainConfig(
    steps=1400,
    batch_size=8,
    workdir="runs/tiny",
    model=ModelConfig(
        vocab_size=2048,
        d_model=128,
        d_ff=512,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        context_length=128,
        rope_theta=10_000.0,
        dtype="float32",
        sparsity=SparsityConfig(l1=2e-3),
    ),
    data=DataConfig(tokenizer="bpe"),
    optimizer=OptimizerConfig(learning_rate=2.5e-3, final_fraction=0.05, warmup_steps=100),
    checkpoint=CheckpointConfig(every=350, keep=2),
    report=ReportConfig(every=20, evaluate_every=350, evaluate_tokens=40_960),
)
