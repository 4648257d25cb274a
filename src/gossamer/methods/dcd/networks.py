"""The networks that DCD trains beside the student: teacher, game, connectors."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import ModelError
from gossamer.kits.adversarial import CycleGame, CycleOptions, Game, JudgeOptions, PairedGame, way_back
from gossamer.kits.teacher import FeatureTap
from gossamer.models.discriminators import PatchDiscriminator
from gossamer.models.generators import Generator, plain_init
from gossamer.models.weights import fill, read_weights

__all__ = ["Best", "Tap", "connector", "find_taps", "make_game", "narrowed", "widened"]


@dataclass(frozen=True)
class Tap:
    """A feature that student and teacher are compared at.

    Attributes:
        student: Module path in the student.
        teacher: Module path in the teacher.
        channels: Channels of the student's feature and of the teacher's.
    """

    student: str
    teacher: str
    channels: tuple[int, int]


class Best(nn.Module):
    """The best teacher so far and its score."""

    score: Tensor

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.register_buffer("score", torch.tensor(math.inf, dtype=torch.float64))

    @torch.no_grad()
    def offer(self, teacher: nn.Module, score: float) -> None:
        """Keep ``teacher`` if its score is lower than the best."""
        if score < float(self.score):
            self.teacher.load_state_dict(teacher.state_dict())
            self.score.fill_(score)


def connector(channels: int, out: int, kind: str) -> nn.Module:
    """Return a trainable map from features [B, channels, h, w] to images [B, out, h, w].

    Args:
        channels: Channels that come in.
        out: Channels of the image: those that the discriminator sees.
        kind: ``"conv_bn_relu"`` (1x1 convolution without bias, batch norm, ReLU) or ``"conv"``.
    """
    parts: list[nn.Module] = [nn.Conv2d(channels, out, 1, bias=False)]
    if kind == "conv_bn_relu":
        parts += [nn.BatchNorm2d(out), nn.ReLU()]
    return plain_init(nn.Sequential(*parts))


def widened(model: nn.Module, width: int | None) -> nn.Module:
    """Return a trainable copy of ``model``, with ``width`` channels and fresh weights where given.

    Raises:
        ModelError: A width is asked of a class of one's own.
    """
    teacher = copy.deepcopy(model).requires_grad_(True).train()
    if width is None:
        return teacher
    if not isinstance(teacher, Generator):
        raise ModelError(
            f"dcd: teacher_width={width} of {type(model).__name__}; expected a generator of "
            f"gossamer.models.generators, or the wide teacher itself as teacher"
        )
    return teacher.set_width(width)


def narrowed(model: nn.Module, width: int | None) -> nn.Module:
    """Return a model like ``model`` but ``width`` wide, on the meta device: for shapes only.

    Raises:
        ModelError: The model cannot be built narrower, or would not be.
    """
    if width is None:
        return model
    if not isinstance(model, Generator):
        raise ModelError(
            f"dcd: width={width} of {type(model).__name__}; expected a generator of gossamer.models.generators. "
            f"Pass the narrow model itself as the model, and the wide one as teacher"
        )
    if not 1 <= width < model.width:
        raise ModelError(f"dcd: width={width}; the model is {model.width} wide, allowed are 1..{model.width - 1}")
    with torch.device("meta"):
        return model.twin(width=width)


def _shapes(model: nn.Module, paths: Sequence[str], size: tuple[int, int, int], who: str) -> list[tuple[int, ...]]:
    """Return the shape [C, h, w] of the features at ``paths`` for one picture of ``size`` (C, H, W).

    Raises:
        ModelError: A module is not there or puts out no feature map.
    """
    probe = copy.deepcopy(model).to("meta").eval()
    kind = next((p.dtype for p in probe.parameters()), torch.float32)
    picture = torch.zeros(1, *size, device="meta", dtype=kind)
    try:
        with torch.no_grad(), FeatureTap(probe, paths, training_only=False) as tap:
            probe(picture)
            shapes = [tuple(t.shape[1:]) for t in tap.read().values()]
    except (RuntimeError, TypeError) as err:
        reason = (str(err).strip() or type(err).__name__).splitlines()[0]
        raise ModelError(f"dcd: the {who} does not take a picture of {list(size)} ({reason})") from err
    flat = [p for p, s in zip(paths, shapes, strict=True) if len(s) != 3]
    if flat:
        raise ModelError(f"dcd: {flat[0]!r} of the {who} puts out no feature map [C, h, w]; tap another module")
    return shapes


def _tap_paths(student: nn.Module, teacher: nn.Module, taps: Sequence[Any] | None) -> list[tuple[str, str]]:
    """Return the module paths to compare, student's and teacher's."""
    if taps is not None and not isinstance(taps[0], int):
        return [(str(s), str(t)) for s, t in taps]
    ours, theirs = (tuple(getattr(m, "taps", ())) for m in (student, teacher))
    numbers = [int(n) for n in taps] if taps is not None else list(range(len(ours)))
    if not ours or len(ours) != len(theirs) or any(not -len(ours) <= n < len(ours) for n in numbers):
        raise ModelError(
            f"dcd: taps={taps}: the student has features {list(ours)}, the teacher {list(theirs)}; expected "
            f"numbers that both have, or pairs of module paths [[student, teacher], ...]"
        )
    return [(ours[n], theirs[n]) for n in numbers]


def find_taps(
    student: nn.Module,
    teacher: nn.Module,
    size: tuple[int, int, int],
    *,
    taps: Sequence[Any] | None,
    layers: int | None,
) -> list[list[Any]]:
    """Return what is compared, a list [student's path, teacher's path, student's channels, teacher's channels] a tap.

    Args:
        student: The narrow generator.
        teacher: The wide one.
        size: (C, H, W) of a picture.
        taps: Numbers of the generators' own features, or pairs of module paths; ``None``: all of their own.
        layers: Those of the discriminator that looks at the features; ``None``: none does.

    Raises:
        ModelError: A tap is not there, the two sizes differ, or the discriminator cannot look at it.
    """
    pairs = _tap_paths(student, teacher, taps)
    ours = _shapes(student, [s for s, _ in pairs], size, "student")
    theirs = _shapes(teacher, [t for _, t in pairs], size, "teacher")
    least = 0 if layers is None else PatchDiscriminator(1, 1, layers).smallest
    found = []
    for (s, t), a, b in zip(pairs, ours, theirs, strict=True):
        if a[1:] != b[1:]:
            raise ModelError(
                f"dcd at {s}: the student's feature is {a[1:]} pixels, the teacher's {b[1:]}; expected equal sizes"
            )
        if min(a[1:]) < least:
            raise ModelError(
                f"dcd at {s}: features of {a[1:]} pixels are too small for a discriminator with layers="
                f"{layers}, which needs {least}; set layers lower, or use larger pictures"
            )
        found.append([s, t, a[0], b[0]])
    return found


def make_game(model: nn.Module, channels: Sequence[int], judge: JudgeOptions, method: Any) -> Game:
    """Return the teacher's game.

    Args:
        model: The student, whose architecture the way back has (at the teacher's width).
        channels: Channels in and out.
        judge: The discriminators and their loss.
        method: The options ``paired, lambda_recon, lambda_cycle, lambda_identity, pool, d_fakes, judge_weights``.

    Raises:
        ModelError: The discriminator's weights do not fit.
    """
    given, made = channels
    game: Game
    if method.paired:
        game = PairedGame(judge.make(given + made), judge, method.lambda_recon)
    else:
        there, back = method.lambda_cycle
        cycle = CycleOptions(there, back, method.lambda_identity, method.pool)
        game = CycleGame(judge.make(made), judge, way_back(model, "dcd"), judge.make(given), cycle)
        if method.d_fakes == "both":
            game.add_player()
    if method.judge_weights is not None:
        fill(game.judge, read_weights(method.judge_weights), repr(method.judge_weights))
    return game
