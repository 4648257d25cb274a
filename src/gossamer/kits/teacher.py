"""A frozen teacher and taps on block outputs, for every method that learns from another network."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gossamer.core.errors import ModelError, RecipeError, StateError

if TYPE_CHECKING:
    from gossamer.core.stack import Stack

__all__ = [
    "SELF",
    "FeatureTap",
    "FrozenTeacher",
    "TakesTeacher",
    "Taught",
    "bind_self",
    "block_paths",
    "resolve_teacher",
]

SELF = "self"
"""Teacher spec that stands for the dense model, before any method has changed it."""
BLOCK_LIST = "blocks"
"""Attribute under which timm's transformers keep their blocks (class-attention blocks have another)."""


def block_paths(model: nn.Module) -> list[str]:
    """Return the module paths of a transformer's blocks, in forward order.

    ViT, DeiT, BEiT and CaiT keep one list ``blocks`` (CaiT's class-attention blocks are another list
    and are left out); Swin keeps one a stage (``layers.0.blocks``, ...).

    Raises:
        ModelError: The model has no list of that name.
    """
    paths: list[str] = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == BLOCK_LIST and isinstance(module, nn.Sequential | nn.ModuleList):
            paths += [f"{name}.{child}" for child, _ in module.named_children()]
    if not paths:
        raise ModelError(
            f"{type(model).__name__}: no nn.Sequential or nn.ModuleList called {BLOCK_LIST!r}; expected a "
            f"transformer such as timm's ViT, DeiT, CaiT or Swin. Name the modules to tap by their paths"
        )
    return paths


class _Hook:
    """A forward hook that a copy of the model does not carry on (an EMA copy must not be recorded)."""

    def __init__(self, tap: FeatureTap | None, path: str | None = None, *, opens: bool = False) -> None:
        self.tap, self.path, self.opens = tap, path, opens

    def __call__(self, module: nn.Module, *args: Any) -> None:
        if self.tap is None:
            return
        if self.path is not None:
            self.tap._record(self.path, args[-1])
        elif self.opens:
            self.tap._open()
        else:
            self.tap._close()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(None)

    def __reduce__(self) -> tuple[type[_Hook], tuple[None]]:
        return _Hook, (None,)


class FeatureTap:
    """Records the outputs of named modules during one forward pass of the whole model.

    What is recorded is handed out once and then let go, so no graph outlives its step. Recording
    happens only between the start and the end of ``model``'s own forward: the recomputation of a
    checkpointed block in the backward pass is not seen, and a deep copy of the model is not tapped.

    Args:
        model: The model whose forward opens and closes the recording.
        paths: Module paths below ``model``, for example ``"blocks.3"``.
        training_only: Record only while ``model.training``; evaluation passes then leave no trace.

    Raises:
        ModelError: A path does not exist.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str], *, training_only: bool = True) -> None:
        self.paths = tuple(dict.fromkeys(paths))
        self._model = model
        self._training_only = training_only
        self._recording = self._grad = False
        self._seen: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        known = dict(model.named_modules())
        for path in self.paths:
            if path not in known:
                raise ModelError(f"{type(model).__name__} has no module {path!r} to tap; its lists are {_lists(model)}")
        self._handles.append(model.register_forward_pre_hook(_Hook(self, opens=True)))
        self._handles += [known[path].register_forward_hook(_Hook(self, path)) for path in self.paths]
        self._handles.append(model.register_forward_hook(_Hook(self), always_call=True))

    def _open(self) -> None:
        self._recording = self._model.training or not self._training_only
        self._grad = torch.is_grad_enabled()
        if not self._recording:
            return
        if any(t.requires_grad for t in self._seen.values()):
            raise StateError(
                f"{len(self._seen)} tapped outputs ({next(iter(self._seen))!r}, ...) were not read before the next "
                f"forward pass; read or clear the tap after each pass"
            )
        self._seen = {}

    def _record(self, path: str, output: Any) -> None:
        if not self._recording:
            return
        if not isinstance(output, Tensor):
            raise ModelError(f"module {path!r} returns {type(output).__name__}; a tap needs one tensor")
        if self._grad and not torch.is_grad_enabled():
            raise StateError(
                f"module {path!r} ran without gradients inside a pass that has them (a re-entrant checkpoint), so a "
                f"loss on its output would train nothing; use checkpoints with use_reentrant=False"
            )
        if path in self._seen:
            raise StateError(f"module {path!r} ran twice in one forward pass; tap a module that runs once")
        self._seen[path] = output

    def _close(self) -> None:
        self._recording = False

    def read(self) -> dict[str, Tensor]:
        """Return what the last forward pass recorded, by path, and forget it.

        Raises:
            StateError: Nothing was recorded for some path since the last read.
        """
        missing = [p for p in self.paths if p not in self._seen]
        if missing:
            raise StateError(
                f"tapped module {missing[0]!r} recorded nothing; expected one forward pass of the tapped "
                f"{type(self._model).__name__}{' in training mode' if self._training_only else ''} before each read"
            )
        seen, self._seen = self._seen, {}
        return {p: seen[p] for p in self.paths}

    def clear(self) -> None:
        """Forget what was recorded (for passes whose loss does not use it)."""
        self._seen = {}

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _lists(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Sequential | nn.ModuleList)][:8]


@dataclass(frozen=True)
class Taught:
    """What a teacher says about a batch.

    Attributes:
        logits: [B, K], detached.
        features: Tapped outputs by module path, detached.
    """

    logits: Tensor
    features: dict[str, Tensor]


@dataclass(frozen=True)
class Renormalise:
    """Change of input normalisation: pixels normalised by ``source`` become normalised by ``target``.

    Attributes:
        source: Mean and standard deviation by channel that the batch was normalised with.
        target: Mean and standard deviation that the teacher expects.
    """

    source: tuple[tuple[float, ...], tuple[float, ...]]
    target: tuple[tuple[float, ...], tuple[float, ...]]

    def __call__(self, image: Tensor) -> Tensor:
        """Return ``image`` [B, C, H, W] in the target normalisation."""
        (m0, s0), (m1, s1) = (
            tuple(image.new_tensor(v).view(1, -1, 1, 1) for v in pair) for pair in (self.source, self.target)
        )
        return (image * s0 + m0 - m1) / s1


class FrozenTeacher:
    """A network in evaluation mode that no gradient reaches; sees the student's own batch.

    Args:
        model: The network; put into evaluation mode, otherwise left as it is.
        renormalise: Applied to the batch first, where the teacher expects another normalisation.

    The batch is resized (antialiased bicubic) where the teacher's patch embedding insists on another
    image size.
    """

    def __init__(self, model: nn.Module, renormalise: Renormalise | None = None) -> None:
        self.model = model.eval()
        self._renormalise = renormalise

    def __call__(self, image: Tensor, paths: Sequence[str] = ()) -> Taught:
        """Return the teacher's logits and the outputs of the modules at ``paths``.

        Args:
            image: The student's batch [B, C, H, W], mixed and augmented.
            paths: Module paths to tap in this pass.

        Raises:
            ModelError: A path does not exist or the teacher does not return one tensor of logits.
        """
        if self.model.training:
            self.model.eval()
        first = next(self.model.parameters(), None)
        if first is not None and first.device != image.device:
            self.model.to(image.device)
        with torch.no_grad(), FeatureTap(self.model, paths, training_only=False) as tap:
            logits = self.model(self._fit(image))
            if not isinstance(logits, Tensor):
                raise ModelError(
                    f"teacher {type(self.model).__name__} returned {type(logits).__name__}; expected logits [B, K]"
                )
            return Taught(logits, tap.read())

    def _fit(self, image: Tensor) -> Tensor:
        if self._renormalise is not None:
            image = self._renormalise(image)
        embed = getattr(self.model, "patch_embed", None)
        size = getattr(embed, "img_size", None) if getattr(embed, "strict_img_size", False) else None
        if size is not None and tuple(size) != tuple(image.shape[-2:]):
            image = F.interpolate(image, size=tuple(size), mode="bicubic", antialias=True)
        return image


@runtime_checkable
class TakesTeacher(Protocol):
    """A method that learns from a teacher and can be handed the dense model as one."""

    teacher: Any

    def bind(self, dense: nn.Module) -> None:
        """Take ``dense`` (frozen, a copy of its own) as the teacher."""


def bind_self(stack: Stack, dense: nn.Module) -> None:
    """Hand a frozen copy of ``dense`` to every method of ``stack`` whose teacher is ``"self"``.

    Call it before ``stack.prepare`` (or, on resume, before ``stack.replay``): afterwards the model
    may already be reduced.

    Args:
        stack: The methods of the run.
        dense: The model before any method has changed it; copied, not kept.
    """
    takers = [m for m in stack.methods if isinstance(m, TakesTeacher) and m.teacher == SELF]
    if not takers:
        return
    frozen = copy.deepcopy(dense).eval()
    for p in frozen.parameters():
        p.grad = None
    frozen.requires_grad_(False)
    for method in takers:
        method.bind(frozen)


def resolve_teacher(spec: str | nn.Module, *, student: nn.Module | None = None) -> FrozenTeacher:
    """Return the teacher that ``spec`` names.

    Args:
        spec: A module (used as given, on the batch as given), or a model spec as the command line takes
            it: a timm name (with timm's pretrained weights: an untrained teacher teaches nothing), a name
            with ``@weights.safetensors``, a saved folder. A loaded teacher gets the batch in its own
            normalisation.
        student: Tells the normalisation of the batch, for a loaded teacher.

    Raises:
        RecipeError: ``spec`` is ``"self"``, which only ``bind_self`` can resolve, or is no spec at all.
        ModelError: The named model cannot be built or its weights not be read.
    """
    if isinstance(spec, nn.Module):
        return FrozenTeacher(spec)
    if not isinstance(spec, str) or not spec:
        raise RecipeError(f"teacher={spec!r}; expected a model, 'self', a timm name, name@weights or a saved folder")
    if spec == SELF:
        raise RecipeError(
            "teacher='self' is not bound to a model; call gossamer.kits.teacher.bind_self(stack, model) before "
            "stack.prepare(model) (gossamer.run does), or pass the teacher as a module"
        )
    from gossamer.models.build import load_model, preprocessing  # only named teachers need it

    is_bare_name = "@" not in spec and not Path(spec).exists()
    model = load_model(spec, pretrained=True if is_bare_name else None)
    if student is None:
        return FrozenTeacher(model)
    ours, theirs = preprocessing(student), preprocessing(model)
    if (tuple(ours.mean), tuple(ours.std)) == (tuple(theirs.mean), tuple(theirs.std)):
        return FrozenTeacher(model)
    pairs = [(tuple(p.mean), tuple(p.std)) for p in (ours, theirs)]
    return FrozenTeacher(model, Renormalise(*pairs))
