"""What sparsity costs and gives, in minutes: some 74 M parameters, about a minute of steps on one H100.

Proportions are near the paper's: heads of 64, and d_ff three times d_model where the paper has 2.75, which is
a multiple of 128, so that the kernels' tiles are whole. A run reads 39 M tokens, and so few need smaller
batches and a stronger λ than the paper's.
"""

from sparse_lm import ModelConfig, SparsityConfig
from train.config import CheckpointConfig, DataConfig, OptimizerConfig, ReportConfig, TrainConfig

config = TrainConfig(
    steps=2400,
    batch_size=16,
    workdir="runs/study",
    model=ModelConfig(
        vocab_size=16_384,
        d_model=768,
        d_ff=2304,
        num_layers=8,
        num_heads=12,
        num_kv_heads=12,
        context_length=1024,
        rope_theta=10_000.0,
        dtype="bfloat16",
        sparsity=SparsityConfig(l1=3e-5),
    ),
    data=DataConfig(tokenizer="bpe", require_paths=True),
    optimizer=OptimizerConfig(learning_rate=1.5e-3, final_fraction=0.05, warmup_steps=100),
    checkpoint=CheckpointConfig(every=1200, keep=1),
    report=ReportConfig(every=50, evaluate_every=1200, evaluate_tokens=262_144),
)
