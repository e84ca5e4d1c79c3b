"""Writing models as ONNX, running the files, and proving that they compute what the models compute."""
