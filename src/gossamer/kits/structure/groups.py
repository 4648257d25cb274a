"""How many units go together: the released sizes, or the device's tiles with heads one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gossamer.core.errors import RecipeError, nearest
from gossamer.kits.structure.regions import Structure
from gossamer.kits.structure.vit import KINDS
from gossamer.runtimes.device import tile

__all__ = ["RELEASED", "check_sizes", "sizes_of"]

RELEASED = {"emb": 16, "head": 2, "qk": 8, "v": 8, "mlp": 16}
"""Units a group in the release of NViT (arXiv 2110.04869)."""
TILES = "tiles"


def check_sizes(given: str | Mapping[str, int], where: str) -> None:
    """Refuse a choice of group sizes that is none.

    Raises:
        RecipeError: Neither ``"tiles"``, ``"released"`` nor positive sizes by kind.
    """
    if isinstance(given, str) and given not in (TILES, "released"):
        allowed = f"'tiles', 'released' and sizes such as {RELEASED}"
        raise RecipeError(f"{where}: group_sizes={given!r}; allowed are {allowed}")
    for kind, size in given.items() if not isinstance(given, str) else ():
        if kind not in KINDS or size < 1:
            hint = nearest(kind, KINDS) if kind not in KINDS else ""
            allowed = f"kinds are {', '.join(KINDS)}, sizes 1 or more"
            raise RecipeError(f"{where}: group_sizes={{{kind!r}: {size}}}; {allowed}{hint}")


def sizes_of(structures: Sequence[Structure], given: str | Mapping[str, int]) -> dict[str, int]:
    """Return the units a group of every structure, never more than it has.

    Args:
        structures: The structures.
        given: ``"tiles"`` (channels in tiles of this device, heads one by one), ``"released"``, or sizes by
            kind (kinds that are left out as in ``"tiles"``).
    """
    by_kind = {k: 1 if k == "head" else tile() for k in KINDS}
    if given == "released":
        by_kind = RELEASED
    elif not isinstance(given, str):
        by_kind = {**by_kind, **given}
    return {s.name: min(by_kind[s.kind], s.units) for s in structures}
