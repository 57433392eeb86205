"""VAE decoders: loaded, written as ONNX, and run."""
