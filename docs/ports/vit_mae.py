"""A training script for ViTMAE of transformers."""

from transformers import ViTMAEConfig, ViTMAEForPreTraining

sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
sizes |= {"decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
sizes |= {"decoder_intermediate_size": 32}
config = ViTMAEConfig(image_size=16, patch_size=4, norm_pix_loss=True, **sizes)
model = ViTMAEForPreTraining(config)
