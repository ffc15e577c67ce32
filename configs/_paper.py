"""The recipe that the paper's models share (arXiv 2603.23198, section 4): only depth and length differ."""

from sparse_lm import ModelConfig, SparsityConfig
from train.config import CheckpointConfig, DataConfig, OptimizerConfig, ReportConfig, TrainConfig


def paper(name: str, *, num_layers: int, steps: int) -> TrainConfig:
    """A run of ``steps`` steps of 512 × 2048 tokens. The paper's text is FineWeb-Edu,
    its tokenizer SmolLM2's."""
    return TrainConfig(
        steps=steps,
        batch_size=512,
        workdir=f"runs/{name}",
        model=ModelConfig(
            vocab_size=49_152,
            d_model=2048,
            d_ff=5632,
            num_layers=num_layers,
            num_heads=32,
            num_kv_heads=32,
            context_length=2048,
            rope_theta=100_000.0,
            norm_eps=1e-5,
            init_std=0.02,
            dtype="bfloat16",
            sparsity=SparsityConfig(l1=2e-5),
        ),
        data=DataConfig(tokenizer="bpe", require_paths=True),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup_steps=600, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, clip=1.0
        ),
        checkpoint=CheckpointConfig(every=1000, keep=3),
        report=ReportConfig(every=10, evaluate_every=1000, evaluate_tokens=1 << 24),
    )
