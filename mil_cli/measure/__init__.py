"""Latency, memory, size, energy and cost of ONNX files, by one protocol."""
