from .quantization import Quantized, quantize

__all__ = ["Quantized", "quantize"]
