"""Quantization: weights, activations and caches in few bits, with scales that keep the function.

Sources
    Nagel et al. 2021, white paper, https://arxiv.org/abs/2106.08295
    Frantar et al. 2022, GPTQ, https://arxiv.org/abs/2210.17323 (Algorithm 1)
    Lin et al. 2023, AWQ, https://arxiv.org/abs/2306.00978
    Xiao et al. 2022, SmoothQuant, https://arxiv.org/abs/2211.10438
    Micikevicius et al. 2022, FP8, https://arxiv.org/abs/2209.05433
    Dettmers et al. 2023, QLoRA (NF4), https://arxiv.org/abs/2305.14314
    OCP Microscaling Formats v1.0 (MXFP4); NVIDIA 2025 (NVFP4), https://arxiv.org/abs/2509.25149
    Ashkboos et al. 2024, QuaRot, https://arxiv.org/abs/2404.00456
    Jacob et al. 2018, observers, https://arxiv.org/abs/1712.05877

Symbols
    paper       here                    meaning
    W           weight                  (rows, cols): outputs, inputs
    s, z        scales, zeros           of each row and group of columns
    H           hessian                 2 X^T X of the layer's inputs
    H^-1        upper                   its Cholesky factor U, H^-1 = U^T U
    B           tile                    columns of a lazy batch (GPTQ)
    E           scaled_errors           error / U[j, j]
    Q, R1 .. R4 turn, turn_head ..      random Hadamard matrices (rotation.py)
"""

from llmopt_lab.quantization.gptq import gptq, hessian_of
from llmopt_lab.quantization.records import Quantized
from llmopt_lab.quantization.reference import dequantize, pack_int4, quantize, unpack_int4

__all__ = ["Quantized", "dequantize", "gptq", "hessian_of", "pack_int4", "quantize", "unpack_int4"]
