"""What a family of published models is, and what all of them have in common."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from sparse_lm.config import Dtype, ModelConfig
from sparse_lm.convert.activations import ACTIVATIONS, ANY, activation_from_hf
from sparse_lm.convert.errors import ConversionError
from sparse_lm.convert.rope import rope_from_hf

Fields = Mapping[str, Any]


def _none(fields: Fields) -> dict[str, Any]:
    return {}


def _no_window(fields: Fields) -> int | None:
    return None


def _gated(fields: Fields) -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class Family:
    """A ``model_type`` of ``config.json``: how its fields become a `ModelConfig`.

    Attributes:
      model_type: as in ``config.json``.
      architecture: its class in the publisher's modelling code.
      qkv_bias: whether its query, key and value projections have biases.
      tied_by_default: what a missing ``tie_word_embeddings`` means.
      ignored: parts of a tensor's name that mark what is no parameter of the model.
      gated: whether its feed-forward layers have a gate.
      scalings: further fields of `ModelConfig`.
      window: tokens that attention reaches back, if it does not reach all.
      unsupported: fields that change the model in a way that is not supported, and the values that do not.
    """

    model_type: str
    architecture: str
    qkv_bias: bool = False
    tied_by_default: bool = False
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)  # a buffer that old versions of transformers saved
    gated: Callable[[Fields], bool] = _gated
    scalings: Callable[[Fields], dict[str, Any]] = _none
    window: Callable[[Fields], int | None] = _no_window
    unsupported: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

    def is_ignored(self, name: str) -> bool:
        """Whether a tensor is no parameter: a buffer, or a counter that the training left."""
        parts = f".{name}."
        return any(f".{mark}." in parts for mark in self.ignored)

    def config(self, fields: Fields) -> ModelConfig:
        """The model that a ``config.json`` describes.

        Raises:
          ConversionError: a field is missing or of a wrong type, or describes what `ModelConfig` cannot.
        """
        for name, harmless in (_UNSUPPORTED | dict(self.unsupported)).items():
            value = fields.get(name)
            if value is not None and value not in harmless:
                raise ConversionError(
                    f"config.json has {name}={value!r}, and this library has no {self.model_type} like that: "
                    f"only models with {name}={harmless[0]!r} can be converted"
                )
        heads = whole_number(fields, "num_attention_heads")
        width = whole_number(fields, "hidden_size")
        head_dim = fields.get("head_dim")
        if head_dim is not None and whole_number(fields, "head_dim") * heads != width:
            raise ConversionError(
                "config.json must have a head_dim of hidden_size / num_attention_heads; found head_dim="
                f"{head_dim!r}, {heads} heads and hidden_size={width}: other heads cannot be converted"
            )
        acts = ACTIVATIONS[self.model_type]
        hidden_act = "" if ANY in acts else required(fields, "hidden_act", str)
        positions = whole_number(fields, "max_position_embeddings")
        theta, scaling = rope_from_hf(fields, positions)
        tied = fields.get("tie_word_embeddings", self.tied_by_default)
        if not isinstance(tied, bool):
            raise ConversionError(
                f"config.json must have true or false as tie_word_embeddings; found {tied!r}"
            )
        kv_heads = fields.get("num_key_value_heads")
        try:
            return ModelConfig(
                vocab_size=whole_number(fields, "vocab_size"),
                d_model=width,
                d_ff=whole_number(fields, "intermediate_size"),
                num_layers=whole_number(fields, "num_hidden_layers"),
                num_heads=heads,
                num_kv_heads=heads if kv_heads is None else whole_number(fields, "num_key_value_heads"),
                gated=self.gated(fields),
                activation=activation_from_hf(self.model_type, hidden_act, fields),
                tied_embeddings=tied,
                qkv_bias=self.qkv_bias,
                # Within the window, attention that slides is the same as attention that does not.
                context_length=min(positions, self.window(fields) or positions),
                rope_theta=theta,
                rope_scaling=scaling,
                norm_eps=float(required(fields, "rms_norm_eps", float)),
                dtype=_dtype(fields),
                **self.scalings(fields),
            )
        except ConversionError:
            raise
        except ValueError as error:
            raise ConversionError(f"config.json describes a model that cannot be: {error}") from error


_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "quantization_config": (None,),
}


def required(fields: Fields, name: str, kind: type) -> Any:
    """A field that every ``config.json`` of the family has.

    Raises:
      ConversionError: it is missing, or of another kind.
    """
    value = fields.get(name)
    kinds = (int, float) if kind is float else kind
    if isinstance(value, bool) or not isinstance(value, kinds):
        words = {int: "a whole number", float: "a number", str: "text"}[kind]
        found = f"found {value!r}" if name in fields else "found none"
        raise ConversionError(f"config.json must have {words} as {name}; {found}")
    return value


def whole_number(fields: Fields, name: str) -> int:
    """A required field with a whole number. Raises ConversionError if it is anything else."""
    return required(fields, name, int)


def sliding_window(fields: Fields) -> int | None:
    """How many tokens attention reaches back, or None where it reaches all."""
    return None if fields.get("sliding_window") is None else whole_number(fields, "sliding_window")


def _dtype(fields: Fields) -> Dtype:
    match fields.get("dtype") or fields.get("torch_dtype") or "float32":
        case "bfloat16" | "float16" | "float32" as name:
            return name
        case other:
            raise ConversionError(
                f"config.json must have bfloat16, float16 or float32 as its torch_dtype; found {other!r}"
            )
