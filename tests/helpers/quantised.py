"""Quantised matrices for tests, format by format: random stored bits, and their values by the format's own definition.

The values are the reference, so they are computed number by number from the bits, in slow loops, without our code.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
AWQ_FIELDS = [0, 4, 1, 5, 2, 6, 3, 7]  # the field of a word that holds its i-th number
SCALE = 2.0**-6  # so that a product with 64 inputs is about as large as these


class Matrix(NamedTuple):
    """The stored tensors of one matrix, name -> tensor, and the matrix's values, float32 [out, in]."""

    tensors: dict[str, torch.Tensor]
    values: np.ndarray


def loop(out: int, into: int, value) -> np.ndarray:
    return np.array([[value(o, i) for i in range(into)] for o in range(out)], np.float32)


def e4m3(byte: int) -> float:
    sign, exponent, mantissa = (-1) ** (byte >> 7), byte >> 3 & 15, byte & 7
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def e2m1(code: int) -> float:
    return (-1) ** (code >> 3) * FP4[code & 7]


def random_scales(rng, *shape: int, dtype=torch.float32, size: float = SCALE) -> torch.Tensor:
    return torch.tensor(rng.uniform(0.5, 2.0, shape) * size).to(dtype)


def random_fp8(rng, *shape: int, low: int = 0, high: int = 0x7F) -> torch.Tensor:
    """FP8 numbers from `low` up to `high`, not included, and their opposites; 0x7f is NaN."""
    codes = rng.integers(low, high, shape) | rng.choice([0, 0x80], shape)
    return torch.tensor(codes.astype(np.uint8)).view(torch.float8_e4m3fn)


def pack(fields: np.ndarray, bits: int, axis: int, order=range(8)) -> torch.Tensor:
    """Words of 32 bits from numbers along `axis`; the i-th number of a word goes to field `order[i]`."""
    per_word = 32 // bits
    fields = np.moveaxis(fields, axis, -1)
    words = np.zeros((fields.shape[0], -(-fields.shape[1] // per_word)), np.uint32)
    for row in range(fields.shape[0]):
        for i, number in enumerate(fields[row].tolist()):
            words[row, i // per_word] |= np.uint32(number << bits * order[i % per_word])
    return torch.tensor(np.moveaxis(words, -1, axis).copy().view(np.int32))


def scaled_fp8(rng, name, out, into, *, block, ending, shape=None, dtype=torch.float32) -> Matrix:
    """DeepSeek-V3, AutoFP8, compressed-tensors, modelopt: a scale for every block of rows and columns."""
    down, across = block
    weight, scale = random_fp8(rng, out, into, high=0x58), random_scales(rng, -(-out // down), -(-into // across))
    scale = (scale / 8).to(dtype)
    codes, scales = weight.view(torch.uint8).tolist(), scale.float().numpy()
    values = loop(out, into, lambda o, i: np.float32(e4m3(codes[o][i])) * scales[o // down, i // across])
    return Matrix({name: weight, name + ending: scale if shape is None else scale.reshape(shape)}, values)


def scaled_int8(rng, name, out, into, *, across, zero=False) -> Matrix:
    """compressed-tensors' int-quantized: a scale, and perhaps a zero, for each row or each group of a row."""
    groups = -(-into // across)
    weight = rng.integers(-128, 128, (out, into)).astype(np.int8)
    zeros = rng.integers(-20, 20, (out, groups)).astype(np.int8)
    scale = random_scales(rng, out, groups, dtype=torch.bfloat16, size=SCALE / 64)
    scales, shift = scale.float().numpy(), zeros.astype(np.float32) * zero
    values = loop(out, into, lambda o, i: (np.float32(weight[o, i]) - shift[o, i // across]) * scales[o, i // across])
    stored = {name: torch.tensor(weight), name + "_scale": scale}
    return Matrix(stored | ({name + "_zero_point": torch.tensor(zeros)} if zero else {}), values)


def packed(rng, name, out, into, *, bits, across, zero=False, ordered=False) -> Matrix:
    """compressed-tensors' pack-quantized: numbers from 0 that stand for numbers around 0, along the inputs."""
    groups, middle = -(-into // across), 2 ** (bits - 1)
    weight, zeros = rng.integers(0, 2 * middle, (out, into)), rng.integers(0, 2 * middle, (out, groups))
    group = rng.permutation(into) // across if ordered else np.arange(into) // across
    scale = random_scales(rng, out, groups, dtype=torch.bfloat16, size=SCALE / middle)
    scales = scale.float().numpy()
    shift = zeros if zero else np.full_like(zeros, middle)
    values = loop(out, into, lambda o, i: np.float32(weight[o, i] - shift[o, group[i]]) * scales[o, group[i]])
    stored = {
        name + "_packed": pack(weight, bits, axis=1),
        name + "_scale": scale,
        name + "_shape": torch.tensor([out, into]),
    }
    if zero:
        stored[name + "_zero_point"] = pack(zeros, bits, axis=0)
    if ordered:
        stored[name + "_g_idx"] = torch.tensor(group.astype(np.int32))
    return Matrix(stored, values)


def gptq(rng, name, out, into, *, bits, across, less=1, ordered=False) -> Matrix:
    """GPTQ: stored [in, out]; a stored zero is `less` below the real one."""
    stem, groups = name.removesuffix("weight"), -(-into // across)
    weight, zeros = rng.integers(0, 2**bits, (into, out)), rng.integers(0, 2**bits, (groups, out))
    group = rng.permutation(into) // across if ordered else np.arange(into) // across
    scale = random_scales(rng, groups, out, dtype=torch.float16, size=SCALE / 2**bits * 2)
    scales = scale.float().numpy()
    values = loop(out, into, lambda o, i: np.float32(weight[i, o] - (zeros[group[i], o] + less)) * scales[group[i], o])
    stored = {
        stem + "qweight": pack(weight, bits, axis=0),
        stem + "qzeros": pack(zeros, bits, axis=1),
        stem + "scales": scale,
        stem + "g_idx": torch.tensor(group.astype(np.int32)),
    }
    return Matrix(stored, values)


def awq(rng, name, out, into, *, across) -> Matrix:
    """AWQ: stored [in, out], words along the outputs, of which the even ones come first in a word."""
    stem, groups = name.removesuffix("weight"), -(-into // across)
    weight, zeros = rng.integers(0, 16, (into, out)), rng.integers(0, 16, (groups, out))
    scale = random_scales(rng, groups, out, dtype=torch.float16, size=SCALE / 8)
    scales = scale.float().numpy()
    values = loop(out, into, lambda o, i: np.float32(weight[i, o] - zeros[i // across, o]) * scales[i // across, o])
    stored = {
        stem + "qweight": pack(weight, 4, axis=1, order=AWQ_FIELDS),
        stem + "qzeros": pack(zeros, 4, axis=1, order=AWQ_FIELDS),
        stem + "scales": scale,
    }
    return Matrix(stored, values)


def random_fp4(rng, out: int, into: int) -> tuple[torch.Tensor, np.ndarray]:
    codes = rng.integers(0, 16, (out, into))
    return torch.tensor((codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)), codes


def mxfp4_packed(rng, name, out, into) -> Matrix:
    """compressed-tensors' MXFP4: a power of two for 32 numbers."""
    weight, codes = random_fp4(rng, out, into)
    exponent = rng.integers(116, 124, (out, into // 32)).astype(np.uint8)
    values = loop(out, into, lambda o, i: e2m1(codes[o, i]) * 2.0 ** (int(exponent[o, i // 32]) - 127))
    return Matrix({name + "_packed": weight, name + "_scale": torch.tensor(exponent)}, values)


def mxfp4_beside(rng, name, out, into) -> Matrix:
    """DeepSeek-V4's: the same, as signed bytes, and E8M0 numbers beside them."""
    stored, values = mxfp4_packed(rng, name, out, into)
    weight, scale = stored[name + "_packed"].view(torch.int8), stored[name + "_scale"].view(torch.float8_e8m0fnu)
    return Matrix({name: weight, name.removesuffix("weight") + "scale": scale}, values)


def fp8_beside(rng, name, out, into, *, block) -> Matrix:
    """The same model's FP8: scales are beside the weight."""
    stored, values = scaled_fp8(rng, name, out, into, block=block, ending="_scale")
    return Matrix({name: stored[name], name.removesuffix("weight") + "scale": stored[name + "_scale"]}, values)


def gpt_oss(rng, name, out, into) -> Matrix:
    """gpt-oss' MXFP4, of one expert; transformers' tensor is the transpose of these values."""
    stored, values = mxfp4_packed(rng, name, out, into)
    blocks = stored[name + "_packed"].reshape(out, into // 32, 16)
    return Matrix({name + "_blocks": blocks, name + "_scales": stored[name + "_scale"]}, values)


def nvfp4(rng, name, out, into, *, weight, whole, divide) -> Matrix:
    """NVFP4: an FP8 scale for 16 numbers, multiplied or divided by one of the whole tensor."""
    stored, codes = random_fp4(rng, out, into)
    scale = random_fp8(rng, out, into // 16, low=0x20, high=0x60)
    total = np.float32(rng.uniform(50, 100) if divide else rng.uniform(0.01, 0.02))
    bytes_ = scale.view(torch.uint8).tolist()

    def value(o, i):
        of_group = np.float32(e4m3(bytes_[o][i // 16]))
        return np.float32(e2m1(codes[o, i])) * (of_group / total if divide else of_group * total)

    tensors = {name + weight: stored, name + "_scale": scale, name + whole: torch.tensor([total])}
    return Matrix(tensors, loop(out, into, value))


class Case(NamedTuple):
    """One format: its settings in the config, the function that makes a matrix, and that function's arguments."""

    config: dict[str, Any]
    make: Any
    settings: dict[str, Any] = {}

    def __call__(self, rng, name: str, out: int, into: int) -> Matrix:
        settings = {key: value(out, into) if callable(value) else value for key, value in self.settings.items()}
        return self.make(rng, name, out, into, **settings)


def compressed(format: str, **weights) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "quantization_status": "compressed",
    }


def gptq_config(bits=4, **changes) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": 16, "desc_act": False, "sym": False} | changes


WHOLE = dict(block=lambda out, into: (out, into))
ROW = dict(block=lambda out, into: (1, into))
CASES = {
    "fp8 blocks": Case(
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [24, 40]},
        scaled_fp8,
        dict(block=(24, 40), ending="_scale_inv"),
    ),
    "deepseek-v4 fp8": Case(
        {"quant_method": "deepseek_v4_fp8", "expert_dtype": "fp8", "weight_block_size": [24, 40]},
        fp8_beside,
        dict(block=(24, 40)),
    ),
    "deepseek-v4 fp4": Case(
        {"quant_method": "deepseek_v4_fp8", "weight_block_size": [24, 40], "scale_fmt": "ue8m0"}, mxfp4_beside
    ),
    "fp8 tensor": Case({"quant_method": "fp8"}, scaled_fp8, WHOLE | dict(ending="_scale", shape=())),
    "fbgemm fp8": Case({"quant_method": "fbgemm_fp8"}, scaled_fp8, ROW | dict(ending="_scale")),
    "fbgemm fp8 columns": Case(
        {"quant_method": "fbgemm_fp8"}, scaled_fp8, dict(block=lambda out, into: (out, 1), ending="_scale")
    ),
    "modelopt fp8": Case(
        {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head", "*mlp.gate"]},
        scaled_fp8,
        WHOLE | dict(ending="_scale", shape=(1,)),
    ),
    "compressed fp8 rows": Case(
        compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        scaled_fp8,
        ROW | dict(ending="_scale", dtype=torch.bfloat16),
    ),
    "compressed fp8 blocks": Case(
        compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[16, 48]),
        scaled_fp8,
        dict(block=(16, 48), ending="_scale"),
    ),
    "compressed int8 rows": Case(
        compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
        scaled_int8,
        dict(across=lambda out, into: into),
    ),
    "compressed int8 groups, zeros": Case(
        compressed("int-quantized", num_bits=8, type="int", strategy="group", group_size=16, symmetric=False),
        scaled_int8,
        dict(across=16, zero=True),
    ),
    "compressed int4": Case(
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
        packed,
        dict(bits=4, across=32),
    ),
    "compressed int4, zeros": Case(
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16, symmetric=False),
        packed,
        dict(bits=4, across=16, zero=True),
    ),
    "compressed int4, ordered": Case(
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16, actorder="group"),
        packed,
        dict(bits=4, across=16, ordered=True),
    ),
    "compressed int8 packed rows": Case(
        compressed("pack-quantized", num_bits=8, type="int", strategy="channel"),
        packed,
        dict(bits=8, across=lambda out, into: into),
    ),
    "compressed mxfp4": Case(
        compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32), mxfp4_packed
    ),
    "compressed nvfp4": Case(
        compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        nvfp4,
        dict(weight="_packed", whole="_global_scale", divide=True),
    ),
    "modelopt nvfp4": Case(
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
        nvfp4,
        dict(weight="", whole="_scale_2", divide=False),
    ),
    "gptq": Case(gptq_config(), gptq, dict(bits=4, across=16)),
    "gptq desc_act": Case(gptq_config(desc_act=True), gptq, dict(bits=4, across=16, ordered=True)),
    "gptq v2": Case(gptq_config(checkpoint_format="gptq_v2"), gptq, dict(bits=4, across=16, less=0)),
    "gptq int8 rows": Case(
        gptq_config(8, group_size=-1), gptq, dict(bits=8, across=lambda out, into: into)
    ),
    "awq": Case(
        {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True,
         "modules_to_not_convert": ["gate"]},
        awq,
        dict(across=16),
    ),
}  # fmt: skip
