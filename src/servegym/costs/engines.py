"""What engines other than vLLM fuse into one kernel, read in their sources.

vLLM is the base line, with the kernels of the fits: rotary embedding, activation and the two norms
of a layer take a kernel each, and the norm of queries and keys one more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from servegym.engines import EngineName

#: Where the activations of a GEMM come from: a norm, attention, or the activation of the FFN.
Producer = Literal["norm", "attention", "activation"]


@dataclass(frozen=True)
class Fusion:
    """Kernels of a layer.

    Attributes:
        rope_in_attention: Whether the rotary embedding is part of the measured attention.
        fp8_casts: Producers whose result a kernel of its own casts to fp8 by a static scale; the
            others write fp8 themselves.
        fp4_casts: The same for fp4.
        shared_tokens: Tokens of a step up to which shared experts run beside the routed ones, in a
            stream of their own or as one more of them.
    """

    rope_in_attention: bool
    fp8_casts: frozenset[Producer]
    fp4_casts: frozenset[Producer]
    shared_tokens: int


#: vLLM: `torch.compile` fuses the casts behind norm and activation, FlashAttention writes 16 bits.
#: vLLM V0, without it, and SGLang: a cast before each GEMM. TensorRT-LLM: attention and SwiGLU
#: write fp8, attention fp4; the norm alone does not, but in an all-reduce that holds it, see
#: `ModelSpec.fused_norms`. Shared experts: `VLLM_SHARED_EXPERTS_STREAM_TOKEN_THRESHOLD` of vLLM,
#: `DUAL_STREAM_TOKEN_THRESHOLD` of SGLang (where it does not fuse them), the largest CUDA graph by
#: default of TensorRT-LLM, which overlaps in graphs alone.
FUSION: dict[EngineName, Fusion] = {
    "vllm": Fusion(
        rope_in_attention=False,
        fp8_casts=frozenset({"attention"}),
        fp4_casts=frozenset({"norm", "attention", "activation"}),
        shared_tokens=256,
    ),
    "vllm-v0": Fusion(
        rope_in_attention=False,
        fp8_casts=frozenset({"norm", "attention", "activation"}),
        fp4_casts=frozenset({"norm", "attention", "activation"}),
        shared_tokens=0,
    ),
    "sglang": Fusion(
        rope_in_attention=False,
        fp8_casts=frozenset({"norm", "attention", "activation"}),
        fp4_casts=frozenset({"norm", "attention", "activation"}),
        shared_tokens=1024,
    ),
    "trtllm": Fusion(
        rope_in_attention=True,
        fp8_casts=frozenset({"norm"}),
        fp4_casts=frozenset({"norm", "activation"}),
        shared_tokens=128,
    ),
}
