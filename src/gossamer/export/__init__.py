"""Finished models to ONNX and OpenVINO IR, with proof."""
