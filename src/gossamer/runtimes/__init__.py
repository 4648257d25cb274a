"""Run and time a graph: OpenVINO, ONNX Runtime, torch."""
