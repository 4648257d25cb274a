"""An ONNX graph as OpenVINO IR."""

from __future__ import annotations

from pathlib import Path

from gossamer.core.errors import ModelError
from gossamer.runtimes.openvino import core, import_openvino
from gossamer.runtimes.session import first_line

__all__ = ["convert"]


def convert(source: Path, target: Path, *, fp16: bool = False) -> None:
    """Convert an ONNX file to IR (``target`` and a .bin beside it).

    Going through ONNX is as fast as converting the torch program directly (int8_layout.md), and both
    runtimes then run the same graph.

    Args:
        source: The .onnx file.
        target: The .xml file to write.
        fp16: Store float weights in 16 bits (int8 weights stay as they are).

    Raises:
        ModelError: OpenVINO cannot convert the graph.
    """
    try:
        model = core().read_model(str(source))  # convert_model would undo the grids of 8-bit layers
        import_openvino().save_model(model, str(target), compress_to_fp16=fp16)
    except Exception as err:
        raise ModelError(f"openvino cannot convert {source.name}: {first_line(err)}") from err
