"""The family of quantization: where quantizers go, which ranges they span, and the methods that decide both."""
