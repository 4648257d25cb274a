"""Two players: generators against discriminators, with pairs (pix2pix) or without (CycleGAN).

A *game* holds everything beside the generator that is trained: discriminators, the generator of the way back, pools
of earlier pictures. Methods say which network plays the generator and lay the moves out as turns. Papers: pix2pix,
arXiv 1611.07004; CycleGAN, arXiv 1703.10593; image pool: arXiv 1612.07828, section 2.3. All state is in buffers, so a
run that is cut resumes exactly, and ranks hold the same pools.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import DataError, ModelError, RecipeError
from gossamer.core.schedule import Batch, Objective, Phase, Step, Terms, Turn
from gossamer.data.pairs import UNPAIRED
from gossamer.kits.norm_statistics import norms_frozen
from gossamer.models.discriminators import PatchDiscriminator
from gossamer.models.generators import Generator
from gossamer.ops.adversarial import check_gan, fooling_loss, judging_loss, wide_mean

__all__ = [
    "CycleGame",
    "Game",
    "ImagePool",
    "JudgeOptions",
    "Notes",
    "PairedGame",
    "adam",
    "drawn_with",
    "frozen",
    "picture_channels",
    "way_back",
    "with_judge",
]

MARGIN_DECAY = 0.9
T = TypeVar("T")


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Let nothing of ``modules`` change by what is computed inside; they still pass gradients on.

    Their parameters get no gradients, their batch norms keep their running statistics.
    """
    held = [p for m in modules for p in m.parameters() if p.requires_grad]
    for p in held:
        p.requires_grad_(False)
    try:
        with ExitStack() as norms:
            for module in modules:
                norms.enter_context(norms_frozen(module))
            yield
    finally:
        for p in held:
            p.requires_grad_(True)


@contextmanager
def drawn_with(seed: int) -> Iterator[None]:
    """Draw the random weights of networks made inside from ``seed``; torch's own random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def adam(betas: Sequence[float], *groups: str) -> dict[str, dict[str, Any]]:
    """Return ``Phase.optimizer`` entries: Adam with these betas and no decay for every group.

    Raises:
        RecipeError: Not two betas of [0, 1).
    """
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise RecipeError(f"betas={list(betas)}; expected two numbers from 0 to below 1")
    return {g: {"opt": "adam", "betas": tuple(betas), "weight_decay": 0.0} for g in groups}


def picture_channels(model: nn.Module, given: Sequence[int] | None, who: str) -> tuple[int, int]:
    """Return the channels that a generator takes and gives.

    Args:
        model: The generator.
        given: Overrides what the model says; needed for a class of one's own.
        who: The method that asks, for messages.

    Raises:
        ModelError: Neither is known.
    """
    if given is not None:
        if len(given) != 2 or min(given) < 1:
            raise RecipeError(f"{who}: channels={list(given)}; expected [channels in, channels out]")
        return int(given[0]), int(given[1])
    if isinstance(model, Generator):
        return int(model.options["in_chans"]), int(model.options["out_chans"])
    raise ModelError(
        f"{who}: {type(model).__name__} does not say how many channels its pictures have; expected a generator of "
        f"gossamer.models.generators (mobile_resnet_9blocks, unet_256, ...), or the option channels=[in, out]"
    )


def way_back(model: nn.Module, who: str) -> nn.Module:
    """Return a fresh generator like ``model`` from the second domain to the first.

    Raises:
        ModelError: ``model`` is of a class of one's own.
    """
    if isinstance(model, Generator):
        return model.twin(in_chans=model.options["out_chans"], out_chans=model.options["in_chans"])
    raise ModelError(
        f"{who}: {type(model).__name__} cannot be built the other way round; expected a generator of "
        f"gossamer.models.generators, or the option partner: a generator from the second domain to the first"
    )


class Notes(Generic[T]):
    """What one turn of a step leaves for a later turn of the same step, by (micro) batch; batches need ids."""

    def __init__(self) -> None:
        self._step: tuple[Any, ...] = ()
        self._kept: dict[tuple[str, ...], T] = {}

    def _of(self, step: Step) -> dict[tuple[str, ...], T]:
        now = step.seed, step.rank, step.phase, step.index
        if self._step != now:
            self._step, self._kept = now, {}
        return self._kept

    def keep(self, batch: Batch, step: Step, note: T) -> None:
        """Leave a note for a batch."""
        kept = self._of(step)
        if batch.get("id"):
            kept[tuple(batch["id"])] = note

    def find(self, batch: Batch, step: Step) -> T | None:
        """Return the note of a batch of this step, or ``None``."""
        return self._of(step).get(tuple(batch.get("id") or ()))


class ImagePool(nn.Module):
    """Shows a discriminator earlier pictures half of the time (arXiv 1612.07828, section 2.3).

    Args:
        size: Pictures kept; 0 shows the latest ones only.
    """

    pictures: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 0:
            raise RecipeError(f"pool={size}; expected 0 (off) or more pictures")
        self.size = size
        self.register_buffer("pictures", torch.zeros(0))

    @torch.no_grad()
    def forward(self, latest: Tensor, draw: torch.Generator) -> Tensor:
        """Return as many pictures [B, C, H, W] as ``latest`` has; each is new or, from a full pool, an old one.

        A full pool gives, with even odds, the new picture itself, or an old one whose place the new one takes.
        """
        if not self.size:
            return latest
        shown = []
        for new in latest.detach():
            if len(self.pictures) < self.size:
                held = self.pictures if self.pictures.ndim > 1 else new.new_zeros(0, *new.shape)
                self.pictures = torch.cat([held, new[None]])
            elif float(torch.rand((), generator=draw)) > 0.5:
                place = int(torch.randint(self.size, (), generator=draw))
                old = self.pictures[place].clone()
                self.pictures[place] = new
                new = old
            shown.append(new)
        return torch.stack(shown)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        held = state_dict.get(prefix + "pictures", self.pictures)
        self.pictures = torch.zeros_like(held, device=self.pictures.device)  # as full as it was saved
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]


@dataclass(frozen=True)
class JudgeOptions:
    """A discriminator and its loss.

    Attributes:
        gan: ``"lsgan"``, ``"hinge"`` or ``"vanilla"``.
        width: Channels of its first layer (ndf).
        layers: Convolutions of stride 2.
        norm: ``"instance"`` or ``"batch"``.
        weight: Weight of the adversarial term in the generators' loss.
    """

    gan: str = "lsgan"
    width: int = 64
    layers: int = 3
    norm: str = "instance"
    weight: float = 1.0

    def make(self, channels: int) -> PatchDiscriminator:
        """Return a fresh discriminator of pictures with ``channels`` channels."""
        check_gan(self.gan)
        return PatchDiscriminator(channels, self.width, self.layers, self.norm)


class Game(nn.Module):
    """The judge of the second domain and what generators and judge minimise.

    Args:
        judge: Discriminator.
        options: Its loss.

    Attributes:
        margin: Running mean of its score of real minus its score of generated pictures; near the largest value
            that its loss rewards (1 for lsgan, 2 for hinge) it is saturated and teaches little.
    """

    margin: Tensor
    paired = False

    def __init__(self, judge: PatchDiscriminator, options: JudgeOptions) -> None:
        super().__init__()
        self.judge, self.options = judge, options
        self.register_buffer("margin", torch.zeros(()))
        self._made: Notes[dict[str, Tensor]] = Notes()

    def view(self, image: Tensor, picture: Tensor) -> Tensor:
        """Return what the judge sees of a picture made from ``image``."""
        return torch.cat([image, picture], 1) if self.paired else picture

    def judges(self) -> list[nn.Parameter]:
        """Return the parameters of all discriminators."""
        return list(self.judge.parameters())

    def partners(self) -> list[nn.Parameter]:
        """Return the parameters of generators that are trained beside the player."""
        return []

    def fooling(self, image: Tensor, picture: Tensor) -> Tensor:
        """Return the weighted adversarial term of pictures [B, C, H, W]; the judge gets no gradient."""
        with frozen(self.judge):
            scores = self.judge(self.view(image, picture))
        return self.options.weight * fooling_loss(scores, self.options.gan)

    def generator_terms(self, generator: nn.Module, batch: Batch, out: Tensor, step: Step) -> Terms:
        """Return what the player minimises, given its pictures ``out`` of the batch."""
        raise NotImplementedError

    def judge_terms(self, pictures: Sequence[Tensor], batch: Batch, step: Step) -> Terms:
        """Return what the judge minimises: ``(real + generated) / 2``, generated being the mean over ``pictures``."""
        image, target = batch["image"], batch["target"]
        return {"judge": self._judged(self.judge, *(self.view(image, x) for x in (target, *pictures)))}

    def _judged(self, judge: nn.Module, real: Tensor, *generated: Tensor) -> Tensor:
        kind, seen = self.options.gan, judge(real)
        scores = [judge(x.detach()) for x in generated]
        fake = torch.stack([judging_loss(s, real=False, kind=kind) for s in scores]).mean()
        if judge is self.judge:
            with torch.no_grad():
                gap = wide_mean(seen) - torch.stack([wide_mean(s) for s in scores]).mean()
                self.margin.lerp_(gap.to(self.margin.dtype), 1 - MARGIN_DECAY)
        return (judging_loss(seen, real=True, kind=kind) + fake) / 2

    # what the player made in its own move need not be made again in the judge's
    def _note(self, batch: Batch, step: Step, **made: Tensor) -> None:
        self._made.keep(batch, step, {k: v.detach() for k, v in made.items()})

    def noted(self, name: str, batch: Batch, step: Step) -> Tensor | None:
        """Return pictures that the player made of this batch in this step, or ``None``."""
        return (self._made.find(batch, step) or {}).get(name)


class PairedGame(Game):
    """pix2pix: the judge sees input and picture side by side, and pictures should be those of the pairs.

    Args:
        judge: Discriminator of both pictures' channels.
        options: Its loss.
        recon: Weight of the mean absolute error (arXiv 1611.07004, equation 4).
    """

    paired = True

    def __init__(self, judge: PatchDiscriminator, options: JudgeOptions, recon: float = 100.0) -> None:
        super().__init__(judge, options)
        self.recon = recon

    def generator_terms(self, generator: nn.Module, batch: Batch, out: Tensor, step: Step) -> Terms:
        """Return ``gan`` and ``recon``.

        Raises:
            DataError: The batch is of pictures without pairs.
        """
        if UNPAIRED in batch:
            raise DataError(
                "these pictures have no pairs, and a generator is to learn from pairs; give some (side:PATH, "
                "'SPEC_A => SPEC_B', task option paired: true), or train it in a way that needs none"
            )
        terms: Terms = {"recon": self.recon * F.l1_loss(out.float(), batch["target"].float())}
        if self.options.weight:
            terms["gan"] = self.fooling(batch["image"], out)
        self._note(batch, step, second=out)
        return terms


@dataclass(frozen=True)
class CycleOptions:
    """Weights of what holds two domains together (arXiv 1703.10593, sections 3.2 and 5.2).

    Attributes:
        first: Weight of the cycle from the first domain and back.
        second: Weight of the cycle from the second domain and back.
        identity: Weight of leaving pictures of the own domain alone, relative to the cycle's.
        pool: Pictures that each image pool keeps.
    """

    first: float = 10.0
    second: float = 10.0
    identity: float = 0.5
    pool: int = 50


class CycleGame(Game):
    """CycleGAN: a way back, a judge for each domain, cycles and identities.

    Args:
        judge: Discriminator of the second domain.
        options: Loss of both discriminators.
        partner: Generator from the second domain to the first.
        partner_judge: Discriminator of the first domain.
        cycle: Weights and pool size.
    """

    def __init__(
        self, judge: PatchDiscriminator, options: JudgeOptions, partner: nn.Module, partner_judge: PatchDiscriminator,
        cycle: CycleOptions | None = None,
    ) -> None:  # fmt: skip
        super().__init__(judge, options)
        self.partner, self.partner_judge, self.cycle = partner, partner_judge, cycle or CycleOptions()
        self.pools = nn.ModuleList([ImagePool(self.cycle.pool)])
        self.partner_pool = ImagePool(self.cycle.pool)

    def add_player(self) -> None:
        """Keep a pool for one more generator whose pictures the judge sees."""
        self.pools.append(ImagePool(self.cycle.pool))

    def judges(self) -> list[nn.Parameter]:
        """Return the parameters of both discriminators."""
        return [*self.judge.parameters(), *self.partner_judge.parameters()]

    def partners(self) -> list[nn.Parameter]:
        """Return the parameters of the generator of the way back."""
        return list(self.partner.parameters())

    def generator_terms(self, generator: nn.Module, batch: Batch, out: Tensor, step: Step) -> Terms:
        """Return ``gan``, ``gan_back``, ``cycle``, ``cycle_back``, ``identity`` and ``identity_back``."""
        first, second, c = batch["image"], batch["target"], self.cycle
        back = self.partner(second)
        with frozen(self.judge, self.partner_judge):
            kind, weight = self.options.gan, self.options.weight
            terms: Terms = {
                "gan": weight * fooling_loss(self.judge(out), kind),
                "gan_back": weight * fooling_loss(self.partner_judge(back), kind),
            }
        terms["cycle"] = c.first * F.l1_loss(self.partner(out).float(), first.float())
        terms["cycle_back"] = c.second * F.l1_loss(generator(back).float(), second.float())
        if c.identity:
            terms["identity"] = c.second * c.identity * F.l1_loss(generator(second).float(), second.float())
            terms["identity_back"] = c.first * c.identity * F.l1_loss(self.partner(first).float(), first.float())
        self._note(batch, step, second=out, first=back)
        return terms

    def judge_terms(self, pictures: Sequence[Tensor], batch: Batch, step: Step) -> Terms:
        """Return ``judge`` and ``judge_back``; generated pictures come through the pools."""
        back = self.noted("first", batch, step)
        if back is None:
            with torch.no_grad(), frozen(self.partner):
                back = self.partner(batch["target"])
        shown = [p(x, step.generator(f"pool.{n}")) for n, (p, x) in enumerate(zip(self.pools, pictures, strict=True))]
        own = self.partner_pool(back, step.generator("pool.back"))
        return {
            "judge": self._judged(self.judge, batch["target"], *shown),
            "judge_back": self._judged(self.partner_judge, batch["image"], own),
        }


def with_judge(
    phase: Phase, objective: Objective, *, first: bool, partners: bool, betas: Sequence[float], lr: float | None = None
) -> Phase:
    """Return a training phase with a turn of the discriminators beside each step.

    Args:
        phase: A phase whose turns train ``"weights"``, the generator.
        objective: Loss of the discriminators; they are the group ``"judge"``.
        first: They move before the generator (pix2pix), or after it (CycleGAN).
        partners: The group ``"partner"`` moves with the weights.
        betas: Betas of Adam for all groups.
        lr: Learning rate of the discriminators; ``None``: as the generator's.

    Raises:
        RecipeError: Betas or rate out of range.
    """
    if lr is not None and not lr > 0:
        raise RecipeError(f"judge_lr={lr}; expected a number above 0, or null for the generator's")
    moves = tuple(
        replace(t, trains=(*t.trains, "partner")) if partners and "weights" in t.trains else t for t in phase.turns
    )
    judge = Turn("judge", ("judge",), objective)
    groups = ("weights", "judge", *(("partner",) if partners else ()))
    return replace(
        phase,
        turns=(judge, *moves) if first else (*moves, judge),
        optimizer={**adam(betas, *groups), **(phase.optimizer or {})},
        lr=phase.lr if lr is None else {**(phase.lr or {}), "judge": lr},
    )
