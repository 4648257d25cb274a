"""Run an exported model on pictures of any size: a folder in, one answer a picture out.

``python -m gossamer.export.runner ARTEFACT PICTURES...`` prints one line of JSON a picture. Needs the folder that an
export has left and no training code. Of a routed model, pictures are routed window by window, so that every branch
works on groups as large as the window gives it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from gossamer.core.errors import DataError, GossamerError
from gossamer.data.images import BROKEN, SUFFIXES, decode
from gossamer.data.transforms import eval_transform
from gossamer.export.artefact import read_artefact
from gossamer.export.verify import RUNTIMES
from gossamer.runtimes import get
from gossamer.runtimes.routed import RoutedSession

__all__ = ["Prediction", "Runner", "find_pictures"]

Picture = str | Path | Image.Image


@dataclass(frozen=True)
class Prediction:
    """What the model says of one picture.

    Attributes:
        name: File, or number of a picture that has none.
        label: Class of the largest score.
        probability: Its softmax, in (0, 1].
        branch: Name of the branch that the picture took, ``None`` for a model without any.
    """

    name: str
    label: int
    probability: float
    branch: str | None


def find_pictures(path: str | Path) -> list[Path]:
    """Return the picture files below a folder in name order, or the file itself.

    Raises:
        DataError: Nothing there.
    """
    root = Path(path)
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"{root}: no pictures; expected a file or a folder with files {', '.join(SUFFIXES)}")
    return files


class Runner:
    """An exported model, ready for pictures.

    Args:
        artefact: Folder of an export: one graph, or a routed set.
        runtime: ``"openvino"`` or ``"onnxruntime"``; by default that of the artefact's format.
        precision: Dense precision; see ``Runtime.load``.
        threads: Threads of the runtime.
        window: Pictures that are decoded and routed at a time; memory and the groups' size grow with it.

    Attributes:
        failed: (name, reason) of every picture that could not be read.

    Raises:
        GossamerError: The artefact or the runtime cannot be used.
    """

    def __init__(
        self, artefact: str | Path, *, runtime: str | None = None, precision: str | None = None, threads: int = 2,
        window: int = 64,
    ) -> None:  # fmt: skip
        self.artefact = read_artefact(artefact)
        engine = get(runtime or RUNTIMES[self.artefact.format])
        self.session = engine.load(self.artefact.graph, precision=precision, threads=threads)
        self.failed: list[tuple[str, str]] = []
        self._fixed = (self.session.input_shape or (None,))[0]
        self._window = max(1, window if self._fixed is None else self._fixed * (window // self._fixed or 1))
        self._transform = eval_transform(self.artefact.preprocessing)

    def __call__(self, pictures: Picture | Iterable[Picture]) -> Iterator[Prediction]:
        """Yield an answer for every readable picture, in order.

        Args:
            pictures: A folder, a file, a picture, or several files and pictures.

        Raises:
            DataError: A folder without pictures.
        """
        listed: Iterable[Picture] = find_pictures(pictures) if isinstance(pictures, str | Path) else (
            [pictures] if isinstance(pictures, Image.Image) else pictures
        )  # fmt: skip
        group: list[tuple[str, np.ndarray]] = []
        for item in self._read(listed):
            group.append(item)
            if len(group) == self._window:
                yield from self._answers(group)
                group = []
        if group:
            yield from self._answers(group)

    def _read(self, pictures: Iterable[Picture]) -> Iterator[tuple[str, np.ndarray]]:
        for number, picture in enumerate(pictures):
            name = f"picture {number}" if isinstance(picture, Image.Image) else str(picture)
            try:
                image = picture.convert("RGB") if isinstance(picture, Image.Image) else decode(Path(picture))
            except BROKEN as err:
                self.failed.append((name, (str(err).strip() or type(err).__name__).splitlines()[0]))
                continue
            yield name, self._transform(image).numpy()

    def _answers(self, group: list[tuple[str, np.ndarray]]) -> Iterator[Prediction]:
        names = [name for name, _ in group]
        logits, branches = self._run(np.stack([x for _, x in group]))
        shifted = np.exp(logits - logits.max(1, keepdims=True))
        labels, tops = logits.argmax(1), (shifted / shifted.sum(1, keepdims=True)).max(1)
        for name, label, top, branch in zip(names, labels, tops, branches, strict=True):
            yield Prediction(name, int(label), float(top), branch)

    def _run(self, x: np.ndarray) -> tuple[np.ndarray, list[str | None]]:
        size = self._fixed or len(x)
        outs: list[np.ndarray] = []
        branches: list[str | None] = []
        for start in range(0, len(x), size):
            part = x[start : start + size]
            full = np.concatenate([part, np.repeat(part[:1], size - len(part), axis=0)])
            outs.append(self.session.run(full)[: len(part)])
            if isinstance(self.session, RoutedSession):
                branches += [self.session.names[j] for j in self.session.chosen[: len(part)]]
            else:
                branches += [None] * len(part)
        return np.concatenate(outs), branches


def main(words: list[str] | None = None) -> int:
    """Answer for the pictures named on the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Run an exported model on pictures.")
    parser.add_argument("artefact", help="folder that gossamer export has left")
    parser.add_argument("pictures", nargs="+", help="files and folders")
    parser.add_argument("--runtime", help="openvino or onnxruntime; default: that of the artefact")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--window", type=int, default=64, help="pictures at a time")
    given = parser.parse_args(words)
    try:
        runner = Runner(given.artefact, runtime=given.runtime, threads=given.threads, window=given.window)
        for answer in runner([p for word in given.pictures for p in find_pictures(word)]):
            print(json.dumps(asdict(answer)))
    except GossamerError as err:
        print(f"error: {err}", file=sys.stderr)
        return err.exit_code
    for name, reason in runner.failed:
        print(f"skipped {name}: {reason}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
