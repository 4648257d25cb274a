"""The Inception network of the Frechet inception distance (arXiv 1706.08500).

The field's weights are those of the TensorFlow model of 2015, as ported to torch by the pytorch-fid project: 1008
outputs, average pooling that does not count the border, and a maximum in the last block's pooling branch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.inception import (
    BasicConv2d,
    Inception3,
    InceptionA,
    InceptionAux,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE,
)

__all__ = ["CLASSES", "FEATURES", "SIZE", "fid_inception"]

CLASSES, FEATURES, SIZE = 1008, 2048, 299


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _chain(x: Tensor, *layers: nn.Module) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


class _A(InceptionA):
    def _forward(self, x: Tensor) -> list[Tensor]:
        five = _chain(x, self.branch5x5_1, self.branch5x5_2)
        double = _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        return [self.branch1x1(x), five, double, self.branch_pool(_average(x))]


class _C(InceptionC):
    def _forward(self, x: Tensor) -> list[Tensor]:
        seven = _chain(x, self.branch7x7_1, self.branch7x7_2, self.branch7x7_3)
        double = _chain(x, *(getattr(self, f"branch7x7dbl_{n}") for n in range(1, 6)))
        return [self.branch1x1(x), seven, double, self.branch_pool(_average(x))]


class _E(InceptionE):
    maximum = False

    def _forward(self, x: Tensor) -> list[Tensor]:
        three = self.branch3x3_1(x)
        double = _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2)
        pooled = F.max_pool2d(x, 3, 1, 1) if self.maximum else _average(x)
        return [
            self.branch1x1(x),
            torch.cat([self.branch3x3_2a(three), self.branch3x3_2b(three)], 1),
            torch.cat([self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)], 1),
            self.branch_pool(pooled),
        ]


def fid_inception() -> Inception3:
    """Return the network, untrained: [B, 3, 299, 299] in [-1, 1] to [B, 1008]; before ``fc`` it has 2048 features."""
    blocks = [BasicConv2d, _A, InceptionB, _C, InceptionD, _E, InceptionAux]
    net = Inception3(CLASSES, aux_logits=False, inception_blocks=blocks, init_weights=False)  # type: ignore[arg-type]
    net.Mixed_7c.maximum = True  # type: ignore[assignment]
    return net.eval()
