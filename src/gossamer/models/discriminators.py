"""Discriminators of image translation: PatchGAN and PixelGAN (pix2pix, arXiv 1611.07004, section 3.2.2).

Modules sit where the published projects have them, so their checkpoints load.
"""

from __future__ import annotations

from torch import Tensor, nn

from gossamer.core.errors import ModelError
from gossamer.models.generators import norm_layer, plain_init

__all__ = ["PatchDiscriminator"]


class PatchDiscriminator(nn.Module):
    """Scores patches of a picture; ``layers`` 3 sees 70 x 70 pixels a score, 0 sees single pixels (PixelGAN).

    Args:
        in_chans: Channels of what is judged; a conditional discriminator judges input and output side by side.
        width: Channels of the first layer (ndf); doubled at each further one, up to 8 times.
        layers: Convolutions of stride 2; 0 is PixelGAN.
        norm: ``"instance"`` or ``"batch"``.

    Attributes:
        activations: Module paths of its activations, in forward order; the last one feeds the scores.

    Raises:
        ModelError: A number is out of range.
    """

    def __init__(self, in_chans: int, width: int = 64, layers: int = 3, norm: str = "instance") -> None:
        super().__init__()
        if width < 1 or not 0 <= layers <= 6:
            raise ModelError(f"discriminator: width={width}, layers={layers}; expected width >= 1, layers 0 to 6")
        self.in_chans, self.width, self.layers = in_chans, width, layers
        bias = norm == "instance"
        kernel, stride, pad = (4, 2, 1) if layers else (1, 1, 0)
        parts: list[nn.Module] = [nn.Conv2d(in_chans, width, kernel, stride, pad), nn.LeakyReLU(0.2)]
        channels = width
        for n in range(1, max(layers, 1) + 1):
            wider = width * min(2**n, 8)
            step = 1 if n >= layers else 2
            parts += [nn.Conv2d(channels, wider, kernel, step, pad, bias=bias), norm_layer(norm, wider)]
            parts.append(nn.LeakyReLU(0.2))
            channels = wider
        parts.append(nn.Conv2d(channels, 1, kernel, 1, pad, bias=bias or bool(layers)))
        self.model = nn.Sequential(*parts)
        self.activations = tuple(f"model.{i}" for i, m in enumerate(parts) if isinstance(m, nn.LeakyReLU))
        plain_init(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores [B, 1, h, w] of pictures ``x`` [B, in_chans, H, W], without a final activation.

        Raises:
            ModelError: The pictures are smaller than the layers need.
        """
        if min(x.shape[-2:]) < self.smallest:
            raise ModelError(
                f"discriminator: pictures of {tuple(x.shape[-2:])} pixels; with {self.layers} layers of stride 2 it "
                f"needs at least {self.smallest} a side: give it fewer layers, or larger pictures"
            )
        return self.model(x)

    def features(self, x: Tensor, activation: int = -1) -> Tensor:
        """Return an activation [B, C, h, w] of pictures ``x``, by number; -1 is the one that feeds the scores.

        Raises:
            ModelError: There is no activation of that number.
        """
        if not -len(self.activations) <= activation < len(self.activations):
            raise ModelError(
                f"discriminator: activation {activation}; it has {len(self.activations)}, allowed are "
                f"{-len(self.activations)}..{len(self.activations) - 1}"
            )
        last = int(self.activations[activation].rpartition(".")[2])
        return self.model[: last + 1](x)

    @property
    def smallest(self) -> int:
        """Smallest side of a picture that leaves a score and a norm something to average."""
        return 3 * 2**self.layers if self.layers else 2
