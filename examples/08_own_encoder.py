"""Train a Q-Former on an image encoder of your own: any module that maps pixels to P features of width E.

python examples/08_own_encoder.py
"""

import torch
from torch import nn

from blip2.backbones.vision import ImageEncoder, Preprocessing
from blip2.config import ObjectivesConfig, QFormerConfig
from blip2.model.representation import RepresentationBatch, RepresentationModel

torch.manual_seed(0)
network = nn.Sequential(nn.Conv2d(3, 32, kernel_size=8, stride=8), nn.GELU(), nn.Conv2d(32, 64, kernel_size=1))
encoder = ImageEncoder(network, network, Preprocessing(image_size=32))  # frozen; [B, 64, 4, 4] becomes [B, 16, 64]
config = QFormerConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=99)
model = RepresentationModel(encoder, config, ObjectivesConfig())

batch = RepresentationBatch(
    images=torch.rand(4, 3, 32, 32),
    ids=torch.randint(3, 98, (4, 6)),
    mask=torch.ones(4, 6, dtype=torch.bool),
    image_ids=torch.arange(4),
)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
for step in range(10):
    losses = model(batch).losses  # ITC, ITM and ITG
    loss = sum(losses.values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(step + 1, *(f"{name} {value.item():.3f}" for name, value in losses.items()))
