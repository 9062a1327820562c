"""A SmolVLM's dimensions, and what is built from them without a download: configuration and processor."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from omegaconf import MISSING, OmegaConf

from smolvlm_exp.models.resolution import MAX_TILES
from smolvlm_exp.utils.fields import one_of
from smolvlm_exp.utils.paths import CONF, PACKAGE

if TYPE_CHECKING:
    from transformers import PretrainedConfig, ProcessorMixin

EMBEDDED = PACKAGE / "models" / "tiny"  # its chat template is every SmolVLM's
ARCHITECTURES = ("idefics3", "smolvlm")
# Fields of `Shape` and what transformers calls them in a model's text and vision configuration.
TEXT_FIELDS = (
    "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "max_position_embeddings",
)  # fmt: skip
VISION_FIELDS = {
    "vision_hidden_size": "hidden_size",
    "vision_num_hidden_layers": "num_hidden_layers",
    "vision_intermediate_size": "intermediate_size",
    "vision_num_attention_heads": "num_attention_heads",
    "image_size": "image_size",
    "patch_size": "patch_size",
}


@dataclass
class Shape:
    """A SmolVLM's dimensions: what `weights=random` needs to build it without a download."""

    architecture: str = one_of(*ARCHITECTURES)  # SmolVLM | SmolVLM2
    hidden_size: int = MISSING
    num_hidden_layers: int = MISSING
    intermediate_size: int = MISSING
    num_attention_heads: int = MISSING
    num_key_value_heads: int = MISSING
    vocab_size: int = MISSING
    rope_theta: float = MISSING
    max_position_embeddings: int = MISSING
    vision_hidden_size: int = MISSING
    vision_num_hidden_layers: int = MISSING
    vision_intermediate_size: int = MISSING
    vision_num_attention_heads: int = MISSING
    image_size: int = MISSING  # pixels per side of a tile
    patch_size: int = MISSING
    scale_factor: int = MISSING  # pixel shuffle: scale_factor^2 patches become one token
    image_token_id: int = MISSING
    fake_image_token_id: int = MISSING
    end_of_utterance_id: int = MISSING
    global_image_token_id: int | None = None  # None: `<global-img>` and `<row_r_col_c>` are plain text (2.2B)

    @property
    def image_seq_len(self) -> int:
        """Tokens per tile."""
        return (self.image_size // self.patch_size) ** 2 // self.scale_factor**2


def model_config(shape: Shape) -> "PretrainedConfig":
    """`shape` as transformers' own configuration. Every value is given: the class's defaults fit no SmolVLM."""
    from transformers import AutoConfig, LlamaConfig

    text = LlamaConfig(  # type: ignore[call-arg]  # rope_theta is still accepted
        **{name: getattr(shape, name) for name in TEXT_FIELDS},
        rope_theta=shape.rope_theta,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=shape.end_of_utterance_id,
        pad_token_id=2,
    )
    return AutoConfig.for_model(
        shape.architecture,
        text_config=text,
        vision_config={theirs: getattr(shape, ours) for ours, theirs in VISION_FIELDS.items()},
        scale_factor=shape.scale_factor,
        image_token_id=shape.image_token_id,
        pad_token_id=2,
        tie_word_embeddings=False,
    )


def shape_from(config: Any) -> Shape:
    """A loaded model's dimensions: `model_config` reversed."""
    text, vision = config.text_config, config.vision_config
    return Shape(
        architecture=config.model_type,
        **{name: getattr(text, name) for name in TEXT_FIELDS},
        rope_theta=text.rope_parameters["rope_theta"],
        **{ours: getattr(vision, theirs) for ours, theirs in VISION_FIELDS.items()},
        scale_factor=config.scale_factor,
        image_token_id=config.image_token_id,
        end_of_utterance_id=text.eos_token_id,
    )


def make_processor(shape: Shape, tokenizer: Any, longest_edge: int | None = None) -> "ProcessorMixin":
    """A processor of the shape's sizes around `tokenizer`. SmolVLM and SmolVLM2 treat images alike.

    Args:
        longest_edge: pixels; None: `MAX_TILES` tiles.
    """
    from transformers import Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    images = Idefics3ImageProcessorPil(
        size={"longest_edge": longest_edge or MAX_TILES * shape.image_size},
        max_image_size={"longest_edge": shape.image_size},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    template = (EMBEDDED / "chat_template.jinja").read_text(encoding="utf-8")
    return Idefics3Processor(images, tokenizer, image_seq_len=shape.image_seq_len, chat_template=template)


def id_of(model: str) -> str:
    """The Hub id in conf/model/<model>.yaml."""
    return str(OmegaConf.load(CONF / "model" / f"{model}.yaml").id)


def shape_of(model: str) -> Shape:
    """The dimensions in conf/model/<model>.yaml."""
    stored = OmegaConf.load(CONF / "model" / f"{model}.yaml").shape
    return cast(Shape, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Shape), stored)))
