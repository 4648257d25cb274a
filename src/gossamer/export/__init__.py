"""Finished models to ONNX and OpenVINO IR, with proof."""

from gossamer.core.callable_module import forward_calls

forward_calls(__name__)
