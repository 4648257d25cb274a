"""From a model's name on the command line or in a recipe to the model."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import timm
from torch import nn

from gossamer.core.errors import ModelError
from gossamer.models.preprocessing import Preprocessing, preprocessing
from gossamer.models.source import ModelSource, create, source_of
from gossamer.models.store import is_saved, load
from gossamer.models.weights import fill, head_classes, read_weights

__all__ = ["EMBEDDED_MODEL", "ModelSource", "Preprocessing", "load_model", "preprocessing", "source_of"]

EMBEDDED_NAME = "vit_tiny_patch16_224"
EMBEDDED_MODEL = f"{EMBEDDED_NAME}@embedded"
"""The ImageNet ViT-Ti/16 that ships with the package."""


def _embedded_weights(name: str) -> Path:
    if name.partition(".")[0] != EMBEDDED_NAME:
        raise ModelError(f"model {name!r} has no embedded weights; the embedded model is {EMBEDDED_MODEL!r}")
    return Path(str(resources.files("gossamer.data.embedded").joinpath(f"{EMBEDDED_NAME}.safetensors")))


def _pretrained(name: str, kwargs: Mapping[str, Any], num_classes: int | None) -> nn.Module:
    """Return the model with timm's own weights, which may come from the network."""
    model = create(name, kwargs, num_classes)
    options = {**kwargs, "num_classes": num_classes} if num_classes is not None else dict(kwargs)
    try:
        trained = timm.create_model(name, pretrained=True, **options)
    except (OSError, RuntimeError, ValueError, ImportError) as err:
        reason = (str(err).strip() or type(err).__name__).splitlines()[0]
        raise ModelError(
            f"pretrained weights of {name!r} could not be fetched ({reason}); download them where there is a "
            f"network and pass '{name}@weights.safetensors'"
        ) from err
    model.load_state_dict(trained.state_dict())
    return model


def load_model(
    spec: str,
    *,
    num_classes: int | None = None,
    pretrained: bool | None = None,
    **options: Any,
) -> nn.Module:
    """Return the model that ``spec`` names, on the CPU, in float32 and evaluation mode.

    Args:
        spec: A timm name (``"deit_small_patch16_224"``), a timm name with weights
            (``"deit_small_patch16_224@weights.safetensors"``, ``"vit_tiny_patch16_224@embedded"``), or a
            folder written by ``gossamer.save``.
        num_classes: Classes of the classifier; where the weights have another number, the
            classifier is new. Default: as the weights have, else as timm has.
        pretrained: Fetch timm's own weights (needs a network or a filled cache); default no.
        **options: Further JSON options of ``timm.create_model`` (``img_size=64``).

    Raises:
        ModelError: Unknown name or option, weights missing, unreadable, pickled or of another
            architecture, a download that failed, or options given for a saved folder.
    """
    if is_saved(spec):
        if num_classes is not None or pretrained or options:
            raise ModelError(f"model folder {spec!r} is complete; drop num_classes, pretrained and other options")
        return load(spec)
    name, has_weights, weights = spec.partition("@")
    if not has_weights:
        if Path(spec).exists() or "/" in spec:
            raise ModelError(
                f"model {spec!r} is neither a folder with model.json nor a timm name; "
                f"weights need their architecture: 'name@weights.safetensors'"
            )
        model = _pretrained(name, options, num_classes) if pretrained else create(name, options, num_classes)
        return model.eval()
    if pretrained:
        raise ModelError(f"model {spec!r} names its weights; drop pretrained=True or the part after '@'")
    path = _embedded_weights(name) if weights == "embedded" else Path(weights)
    probe = create(name, options, num_classes)
    state = read_weights(path)
    found = head_classes(probe, state)
    if num_classes is None and found and found != getattr(probe, "num_classes", found):
        probe = create(name, options, found)
    return fill(probe, state, repr(weights), new_head=num_classes is not None).eval()
