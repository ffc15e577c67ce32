"""What is wrong with a directory is said in one sentence, before anything is written."""

import json
import pickle
import struct

import ml_dtypes  # noqa: F401  NumPy learns bfloat16
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sparse_lm import ModelConfig
from sparse_lm.convert import ConversionError, config_to_hf, open_hf


def refusal(directory):
    """The sentence that `open_hf` says of a directory."""
    with pytest.raises(ConversionError) as caught, open_hf(directory):
        pass
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def change_config(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, path)


UP = "model.layers.1.mlp.up_proj.weight"


def test_a_missing_tensor(llama):
    change_tensors(llama, lambda tensors: tensors.pop(UP))
    assert f"must hold the tensor {UP}" in refusal(llama)


def test_an_extra_tensor(llama):
    change_tensors(llama, lambda tensors: tensors.update(score=tensors[UP]))
    assert "found score besides" in refusal(llama)


def test_a_misshapen_tensor(llama):
    change_tensors(llama, lambda tensors: tensors.update({UP: tensors[UP][:16]}))
    assert "must have the shape (32, 32)" in refusal(llama)


@pytest.mark.parametrize("dtype", [np.int8, np.float64])
def test_a_wrong_dtype(llama, dtype):
    change_tensors(llama, lambda tensors: tensors.update({UP: tensors[UP].astype(dtype)}))
    assert "must be stored as one of F32, F16, BF16" in refusal(llama)


@pytest.mark.parametrize("length", [0, 4, 2000, 30000])
def test_a_truncated_file(llama, length):
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert "must be a whole safetensors file" in refusal(llama)


@pytest.mark.parametrize("length", [2**63, 10**12, 5])
def test_an_absurd_header_length(llama, length):
    path = llama / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    assert "must be a whole safetensors file" in refusal(llama)


def test_a_pickle_is_named_and_not_read(llama):
    (llama / "model.safetensors").unlink()
    (llama / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    assert "found pytorch_model.bin, a pickle" in refusal(llama)


def test_no_weights_at_all(llama):
    (llama / "model.safetensors").unlink()
    assert "found neither" in refusal(llama)


def test_no_directory(tmp_path):
    assert "must be a directory" in refusal(tmp_path / "nothing")


def test_an_index_names_a_missing_shard(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    assert "names the file model-00002-of-00003.safetensors" in refusal(sharded)


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", ".."])
def test_a_path_that_leaves_the_directory(sharded, place):
    (sharded.parent / "outside.safetensors").write_bytes(b"")
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = place
    index.write_text(json.dumps(content))
    assert f"must name files of its own directory; found {place!r}" in refusal(sharded)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', "{"])
def test_an_index_that_is_none(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json must" in refusal(sharded)


def test_a_tensor_in_two_files(sharded):
    first = sharded / "model-00001-of-00003.safetensors"
    (sharded / "model-00002-of-00003.safetensors").write_bytes(first.read_bytes())
    assert "must hold each tensor once" in refusal(sharded)


def test_another_head_beside_tied_embeddings(sharded):
    path = sharded / "model-00003-of-00003.safetensors"
    head = np.zeros((40, 32), "bfloat16")
    save_file(load_file(path) | {"lm_head.weight": head}, path)
    assert "contradicts its tensors" in refusal(sharded)


def test_a_copy_of_tied_embeddings_is_dropped(sharded):
    """As MiniCPM's checkpoints have it."""
    everything = {}
    for path in sharded.glob("*.safetensors"):
        everything |= load_file(path)
    last = sharded / "model-00003-of-00003.safetensors"
    head = everything["model.embed_tokens.weight"].copy()
    save_file(load_file(last) | {"lm_head.weight": head}, last)
    with open_hf(sharded) as weights:
        assert weights.config.tied_embeddings


def test_buffers_of_old_versions_are_dropped(llama):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(llama, lambda tensors: tensors.update({name: np.ones(4, np.float32)}))
    with open_hf(llama) as weights:
        assert weights.config.num_layers == 2


@pytest.mark.parametrize("missing", ["config.json", "hidden_size", "rms_norm_eps", "hidden_act"])
def test_a_missing_configuration(llama, missing):
    path = llama / "config.json"
    if missing == "config.json":
        path.unlink()
    else:
        fields = json.loads(path.read_text())
        del fields[missing]
        path.write_text(json.dumps(fields))
    sentence = refusal(llama)
    assert missing in sentence
    assert "found none" in sentence


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": ["llama"]}, "must have a model_type"),
        ({"head_dim": {}}, "must have a whole number as head_dim"),
        ({"model_type": "bamboo", "sliding_window": "wide"}, "must have a whole number as sliding_window"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "found ['yarn']"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "rope_theta": 1}}, "over 1 for yarn"),
        ({"model_type": "gpt2"}, "must have a model_type that this library knows"),
        ({"hidden_act": "silu"}, "for llama one of relu, relu2; found 'silu'"),
        ({"hidden_act": "shiftrelu"}, "found 'shiftrelu'"),
        ({"model_type": "sparsellama", "hidden_act": "fatrelu"}, "hidden_act_param"),
        ({"model_type": "sparsellama", "hidden_act": "fatrelu", "hidden_act_param": -1.0}, "at least 0"),
        ({"model_type": "minicpm"}, "must have a number as dim_model_base"),
        ({"model_type": "minicpm", "num_experts": 8}, "num_experts=8"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "found 'longrope'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "odd": 1}}, "found odd"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "must have a number as factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "rope_scaling that cannot be"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "must rotate whole heads"),
        ({"rope_parameters": 7}, "must have a table of fields as rope_scaling"),
        ({"head_dim": 16}, "head_dim=16"),
        ({"num_hidden_layers": 3}, "must hold the tensor model.layers.2."),
        ({"num_hidden_layers": 1}, "found model.layers.1."),
        ({"hidden_size": 64}, "head_dim"),
        ({"intermediate_size": 64}, "must have the shape (64, 32)"),
        ({"vocab_size": "many"}, "must have a whole number as vocab_size; found 'many'"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"num_attention_heads": 3, "head_dim": None}, "describes a model that cannot be"),
        ({"tie_word_embeddings": "yes"}, "must have true or false"),
        ({"dtype": "float64"}, "must have bfloat16, float16 or float32"),
        (
            {"model_type": "llama_sparse_relu", "sparsity_use_hybrid_kernel": True},
            "sparsity_use_hybrid_kernel",
        ),
    ],
)
def test_a_configuration_that_cannot_be_converted(llama, fields, said):
    change_config(llama, **fields)
    assert said in refusal(llama)


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_configuration_that_is_no_json_object(llama, content):
    (llama / "config.json").write_text(content, encoding="latin-1")
    assert "config.json must" in refusal(llama)


def test_a_window_bounds_the_context(llama):
    """Attention that slides over more than the context is attention over all of it."""
    change_config(llama, model_type="bamboo", sliding_window=16)
    with open_hf(llama) as weights:
        assert weights.config.context_length == 16


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(gated=False, qkv_bias=True),
        ModelConfig(activation="drelu", embedding_scale=2.0),
        ModelConfig(activation="threshold(0.1)", gated=False),
    ],
)
def test_a_model_that_no_family_is_like(config):
    with pytest.raises(ConversionError, match="no published family has this model's"):
        config_to_hf(config)
