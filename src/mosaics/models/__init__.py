"""The mosaic as a Hugging Face model. Importing this package registers it with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from mosaics.models.configuration_mosaic import MosaicConfig
from mosaics.models.draws import draw
from mosaics.models.loss import count_targets, laid_out
from mosaics.models.modeling_mosaic import MosaicForCausalLM, MosaicModel
from mosaics.models.presets import PRESETS

AutoConfig.register("mosaic", MosaicConfig, exist_ok=True)
AutoModel.register(MosaicConfig, MosaicModel, exist_ok=True)
AutoModelForCausalLM.register(MosaicConfig, MosaicForCausalLM, exist_ok=True)

__all__ = ["PRESETS", "MosaicConfig", "MosaicForCausalLM", "MosaicModel", "count_targets", "draw", "laid_out"]
