"""CLIP's vision encoder without its last layer, as a LLaVA takes its features: transformers' code."""

import torch
from transformers import CLIPVisionModel


class Features(torch.nn.Module):
    def __init__(self, folder, dtype):
        super().__init__()
        model = CLIPVisionModel.from_pretrained(folder, dtype=dtype).eval()
        self.vision = getattr(model, "vision_model", model)
        self.vision.encoder.layers = self.vision.encoder.layers[:-1]

    def forward(self, pixels):
        x = self.vision.pre_layrnorm(self.vision.embeddings(pixels))
        for layer in self.vision.encoder.layers:
            x = layer(x, None)
            x = x[0] if isinstance(x, tuple) else x
        return x
