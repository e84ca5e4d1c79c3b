"""Public model libraries put through the graph engine: capture, analysis, cut, proof, training, archive, ONNX."""
