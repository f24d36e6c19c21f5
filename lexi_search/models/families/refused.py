"""Families of mixture-of-experts models that are refused, and why."""

from collections.abc import Mapping
from types import MappingProxyType

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "aria_text": "it is the language model of aria: take the whole checkpoint",
        "deepseek_v41": "only vLLM has its code, for GPUs, and nothing here could judge a profile of it",
        "diffusion_gemma": "it denoises blocks of tokens, and no forward pass here does that",
        "doge": "its experts are rows of two tables, chosen by pairs of keys",
        "dots3_note": "its code is vLLM's for NVIDIA GPUs alone, and nothing here could judge a profile of it",
        "ernie4_5_vl_moe": "each layer has two routers, of text and of images, and experts of two widths in one list",
        "inkling_mm_model": "its router has rows for shared experts among those of routed ones",
        "inkling_text": "its router has rows for shared experts among those of routed ones",
        "jetmoe": "its attention chooses experts, too: a layer has two routers",
        "longcat_flash": "some of its experts do nothing, so that k counts no work",
        "minimax_m3_vl_text": "it is the language model of minimax_m3_vl: take the whole checkpoint",
        "qwen3_omni_moe_thinker": "it is a part of qwen3_omni_moe: take the whole checkpoint",
        "qwen4_exp_text": "it is the language model of qwen4_exp: take the whole checkpoint",
        "zaya": "it runs one expert a token, and its router reads what that of the layer before has computed",
    }
)
