"""The evaluator that judges the demo model's images: a small CNN, trained on real Fashion-MNIST images only.

It gives two figures. The **class accuracy** is the share of images in which the CNN sees the label that was asked for.
The **Fréchet distance** (Heusel et al. 2017, arXiv 1706.08500) is between the CNN's features of two sets of images. The
features are not Inception's, so a distance can be compared only with other distances by this evaluator.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

HERE = Path(__file__).parent
WEIGHTS = HERE / "evaluator.safetensors"
REFERENCE = HERE / "reference_features.npz"
CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


class Evaluator(nn.Module):
    """Grey 32×32 images in [-1, 1] → class logits ``[N, 10]`` and features ``[N, 64]``."""

    def __init__(self) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int) -> list[nn.Module]:
            return [
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
                nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]

        self.convolutions = nn.Sequential(*stage(1, 16), *stage(16, 32), *stage(32, 64))  # (N, 64, 4, 4)
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(1024, 64), nn.ReLU())
        self.dropout = nn.Dropout(0.3)
        self.classes = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(self.convolutions(images))
        return self.classes(self.dropout(features)), features


def load_evaluator() -> Evaluator:
    """Load the committed evaluator, frozen and in evaluation mode."""
    evaluator = Evaluator()
    evaluator.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
    return evaluator.eval().requires_grad_(False)


def judge(evaluator: Evaluator, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images ``[N, 32, 32, 3]`` → predicted classes ``[N]`` and float64 features ``[N, 64]``."""
    classes, features = [], []
    with torch.inference_mode():
        for chunk in np.array_split(images, max(1, len(images) // 250)):
            grey = torch.from_numpy(chunk).float().mean(dim=-1)[:, None] / 127.5 - 1.0  # (n, 1, 32, 32)
            logits, feature = evaluator(grey)
            classes.append(logits.argmax(dim=1).numpy())
            features.append(feature.double().numpy())
    return np.concatenate(classes), np.concatenate(features)


def statistics_of(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean ``[64]`` and covariance ``[64, 64]`` of features ``[N, 64]``."""
    return features.mean(axis=0), np.cov(features, rowvar=False)


def frechet_distance(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> float:
    """|μ₁−μ₂|² + Tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½), from the eigenvalues of Σ₁Σ₂, which are real and ≥ 0."""
    (mean_1, cov_1), (mean_2, cov_2) = first, second
    eigenvalues = np.linalg.eigvals(cov_1 @ cov_2).real.clip(min=0)
    distance = np.sum((mean_1 - mean_2) ** 2) + np.trace(cov_1) + np.trace(cov_2) - 2 * np.sqrt(eigenvalues).sum()
    return float(distance)


def reference_statistics() -> dict[str, np.ndarray]:
    """Read the statistics that the figures are compared with, as ``train.py`` stored them.

    ``mean`` and ``covariance`` of the features of all 60 000 training images, and the scalars ``real_accuracy`` (on
    the 10 000 test images), ``test_distance`` (test images), ``reconstruction_distance``, ``reconstruction_accuracy``
    and ``reconstruction_psnr`` (the test images through the autoencoder).
    """
    with np.load(REFERENCE, allow_pickle=False) as stored:
        return dict(stored)
