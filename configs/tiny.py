"""A small model of the shipped speeches that two CPU cores train in minutes."""

from sparse_lm import ModelConfig, SparsityConfig
from train.config import CheckpointConfig, DataConfig, OptimizerConfig, ReportConfig, TrainConfig

config = TrainConfig(
    steps=700,
    batch_size=16,
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
        sparsity=SparsityConfig(l1=1e-3),
    ),
    data=DataConfig(tokenizer="bpe"),
    optimizer=OptimizerConfig(learning_rate=3e-3, final_fraction=0.05, warmup_steps=50),
    checkpoint=CheckpointConfig(every=200, keep=2),
    report=ReportConfig(every=10, evaluate_every=200, evaluate_batches=32),
)
