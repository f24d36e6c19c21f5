"""Every format of quantised weights: values against the format's definition, and against the tools that write it."""

import json
from fractions import Fraction

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
import torch
from quantised import AWQ_FIELDS, CASES, gpt_oss, pack
from safetensors.torch import load_file, save_file

from lexi_search.artifacts.profile import ProfileSettings
from lexi_search.checkpoint.dequantise import Plain, dequantise
from lexi_search.checkpoint.reader import open_checkpoint
from lexi_search.errors import InputError
from lexi_search.models.decoder_stack import describe_decoder
from lexi_search.models.loading.streaming import stream_layers
from lexi_search.models.model import describe, find_dtype
from lexi_search.profiling.profile import profile_layers
from lexi_search.pruning.prune import prune

NAME = "model.layers.0.mlp.experts.0.gate_proj.weight"
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def write(folder, tensors, quantisation=None, **config):
    settings = config | ({"quantization_config": quantisation} if quantisation else {})
    (folder / "config.json").write_text(json.dumps(settings))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return open_checkpoint(folder)


def read(checkpoint, name=NAME):
    """The values of a logical tensor, as the device makes them."""
    stored = checkpoint.tensors[name]
    parts = {role: checkpoint[part] for role, part in stored.parts.items()}
    parts = {r: p.view(np.uint8) if p.dtype == ml_dtypes.float8_e8m0fnu else p for r, p in parts.items()}
    values = np.asarray(dequantise(jax.device_put(parts), stored.scheme, stored.shape, stored.dtype.name))
    assert values.shape == stored.shape and values.dtype == stored.dtype
    return values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_values_are_the_definitions(case, dtype, tmp_path):
    """Bit for bit: the float32 value by definition, rounded once to the config's own element type."""
    tensors, values = CASES[case](np.random.default_rng(0), NAME, 48, 96)
    checkpoint = write(tmp_path, tensors, CASES[case].config, dtype=dtype)
    np.testing.assert_array_equal(read(checkpoint), values.astype(DTYPES[dtype]))
    assert set(checkpoint.tensors) >= {NAME} and np.abs(values).max() > 0


def test_last_blocks_hang_over(tmp_path):
    """DeepSeek-V3's blocks of 128 x 128 on a matrix of 130 x 300."""
    tensors, values = CASES["fp8 blocks"]._replace(settings=dict(block=(128, 128), ending="_scale_inv"))(
        np.random.default_rng(1), NAME, 130, 300
    )
    assert tensors[NAME + "_scale_inv"].shape == (2, 3)
    checkpoint = write(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [128, 128]}, dtype="float32")
    np.testing.assert_array_equal(read(checkpoint), values)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_every_fp8_code(kind, tmp_path):
    weight = torch.arange(256, dtype=torch.uint8).reshape(16, 16).view(getattr(torch, kind))
    tensors = {NAME: weight, NAME + "_scale": torch.tensor(1.0)}
    values = read(write(tmp_path, tensors, {"quant_method": "fp8"}, dtype="float32"))
    np.testing.assert_array_equal(values, weight.float().numpy())


def test_scales_that_are_powers_of_two(tmp_path):
    """E8M0 scales of FP8 blocks (scale_fmt ue8m0), stored as such; their NaN is kept, to be refused when it is read."""
    scale = torch.tensor([[120, 255], [1, 254]], dtype=torch.uint8)
    tensors = {NAME: torch.ones(4, 6).to(torch.float8_e4m3fn), NAME + "_scale_inv": scale.view(torch.float8_e8m0fnu)}
    config = {"quant_method": "fp8", "weight_block_size": [2, 3]}
    values = read(write(tmp_path, tensors, config, dtype="float32"))
    assert values[::2, ::3].tolist() == [[2.0**-7, pytest.approx(np.nan, nan_ok=True)], [2.0**-126, 2.0**127]]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gpt_oss_as_transformers_reads_it(dtype, tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    matrices = [gpt_oss(np.random.default_rng(e), "experts.gate_up_proj", 64, 96) for e in range(3)]
    tensors = {name: torch.stack([m.tensors[name] for m in matrices]) for name in matrices[0].tensors}
    checkpoint = write(tmp_path, tensors, {"quant_method": "mxfp4"}, dtype=dtype)
    stored = checkpoint.tensors["experts.gate_up_proj"]
    assert stored.shape == (3, 96, 64) and list(checkpoint.tensors) == [
        "experts.gate_up_proj",
        "experts.gate_up_proj_scales",
    ]
    theirs = convert_moe_packed_tensors(*tensors.values(), dtype=getattr(torch, dtype)).float().numpy()
    for expert in range(3):
        parts = jax.device_put({role: checkpoint[part][expert] for role, part in stored.parts.items()})
        values = np.asarray(dequantise(parts, stored.scheme, stored.shape[1:], dtype)).astype(np.float32)
        np.testing.assert_array_equal(values, theirs[expert])
        np.testing.assert_array_equal(values.T, matrices[expert].values)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("compressed")])
def test_as_compressed_tensors_reads_it(case, tmp_path):
    """The decompressor of the package that defines the formats. That of NVFP4 computes in bfloat16, ours in float32."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    config = CASES[case].config
    tensors, _ = CASES[case](np.random.default_rng(2), "weight", 48, 96)
    ours = read(write(tmp_path, tensors, config, dtype="bfloat16"), "weight").astype(np.float32)
    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    decompressor = BaseCompressor.get_value_from_registry(config["format"])
    theirs = decompressor.decompress(dict(tensors), scheme)["weight"].to(torch.bfloat16).float().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=2**-6 if case == "compressed nvfp4" else 0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_words_are_packed_as_vllm_packs_them():
    from vllm.model_executor.layers.quantization.utils.quant_utils import awq_pack, gptq_pack

    numbers = np.random.default_rng(3).integers(0, 16, (32, 48))
    as_int = torch.tensor(numbers, dtype=torch.int32)
    assert torch.equal(pack(numbers, 4, axis=0), gptq_pack(as_int, 4, 32, 48))
    assert torch.equal(pack(numbers, 4, axis=1, order=AWQ_FIELDS), awq_pack(as_int, 4, 32, 48))


def test_fp8_blocks_as_transformers_reads_them(tmp_path):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    case = CASES["fp8 blocks"]._replace(settings=dict(block=(24, 32), ending="_scale_inv"))
    tensors, values = case(np.random.default_rng(3), NAME, 48, 96)
    theirs = Fp8Dequantize(None)._dequantize_one(tensors[NAME], tensors[NAME + "_scale_inv"], torch.bfloat16)
    config = {"quant_method": "fp8", "weight_block_size": [24, 32]}
    ours = read(write(tmp_path, tensors, config, dtype="bfloat16"))
    np.testing.assert_array_equal(ours.astype(np.float32), theirs.float().numpy())


def quantise(folder, case, make=None, *, dtype, plain=None):
    """A tiny model's checkpoint with experts of this format, and beside it the same with their values as they are."""
    config = json.loads((folder / "config.json").read_text()) | {"dtype": dtype}
    config.pop("torch_dtype", None)
    stored = load_file(folder / "model.safetensors")
    quantised, dequantised, rng = {}, {}, np.random.default_rng(4)
    for name, tensor in stored.items():
        if ".experts." in name:
            matrix = CASES[case](rng, name, *tensor.shape)
            quantised |= matrix.tensors
            dequantised[name] = torch.tensor(matrix.values).to(getattr(torch, dtype))
        else:
            kind = getattr(torch, dtype) if tensor.is_floating_point() else tensor.dtype
            quantised[name] = dequantised[name] = tensor.to(kind)
    (folder / "quantised").mkdir()
    (folder / "plain").mkdir()
    return (
        write(folder / "quantised", quantised, CASES[case].config, **config),
        write(folder / "plain", dequantised, **config),
    )


def profile(checkpoint):
    model = describe(checkpoint)
    settings = ProfileSettings(
        input="paper", seed=0, batch=1, length=32, dtype=find_dtype(checkpoint, model), relative_error=0.0,
        max_samples=64,
    )  # fmt: skip
    return model.identity, list(profile_layers(checkpoint, model, layers=model.layers, settings=settings)), settings


SMALL = dict(num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)


@pytest.mark.parametrize("case", CASES)
def test_profile_is_that_of_the_dequantised_checkpoint(case, tmp_path):
    tiny.make_checkpoint("qwen3_moe", tmp_path, **SMALL)
    dtype = "float32" if "fp8" in case else "bfloat16"
    quantised, plain = quantise(tmp_path, case, dtype=dtype)
    assert profile(quantised) == profile(plain) and profile(plain)[2].dtype == dtype


@pytest.mark.parametrize("experts", ["fp4", "fp8"])
def test_profile_of_deepseek_v4_as_on_the_hub(experts, tmp_path):
    """Its config says fp8 alone, which is FP4 for experts unless `expert_dtype` says otherwise."""
    tiny.make_checkpoint("deepseek_v4", tmp_path)
    quantised, plain = quantise(tmp_path, f"deepseek-v4 {experts}", dtype="bfloat16")
    config = json.loads((quantised.folder / "config.json").read_text())
    config["quantization_config"] |= {"quant_method": "fp8"}
    if experts == "fp8":
        config["expert_dtype"] = config["quantization_config"].pop("expert_dtype")
    (quantised.folder / "config.json").write_text(json.dumps(config))
    assert profile(open_checkpoint(quantised.folder)) == profile(plain)


@pytest.mark.parametrize(("family", "format"), [("gpt_oss", "gpt-oss"), ("qwen3_moe", "fp8 blocks")])
def test_profile_of_fused_experts(family, format, tmp_path):
    """One tensor for all experts: gpt-oss' [experts, in, out], with biases, and FP8 blocks of [experts, out, in]."""
    tiny.make_checkpoint(family, tmp_path, num_hidden_layers=1)
    config = json.loads((tmp_path / "config.json").read_text()) | {"dtype": "bfloat16"}
    stored, rng = load_file(tmp_path / "model.safetensors"), np.random.default_rng(5)
    kept = {n: t.bfloat16() for n, t in stored.items() if ".experts." not in n or n.endswith("_bias")}
    quantised, plain = dict(kept), dict(kept)
    for name, shape in (("gate_up_proj", (64, 64)), ("down_proj", (64, 32))):
        name = "model.layers.0.mlp.experts." + name
        make = gpt_oss if format == "gpt-oss" else CASES[format]
        matrices = [make(rng, name, *shape) for _ in range(config.get("num_local_experts") or config["num_experts"])]
        quantised |= {part: torch.stack([m.tensors[part] for m in matrices]) for part in matrices[0].tensors}
        values = torch.tensor(np.stack([m.values for m in matrices])).bfloat16()
        plain[name] = values.mT if format == "gpt-oss" else values
        assert name not in stored or stored[name].shape == plain[name].shape  # as transformers has it
    (tmp_path / "plain").mkdir()
    settings = {"quant_method": "mxfp4"} if format == "gpt-oss" else CASES[format].config
    assert profile(write(tmp_path, quantised, settings, **config)) == profile(
        write(tmp_path / "plain", plain, **config)
    )


@pytest.mark.parametrize("shape", [(), (1,), (16,)])
def test_fused_experts_with_one_scale(shape, tmp_path):
    """ModelOpt's FP8 of Llama 4: experts stored [experts, in, out], with one scale for all of them, or for each."""
    tiny.make_checkpoint("qwen3_moe", tmp_path, num_hidden_layers=1)
    config = json.loads((tmp_path / "config.json").read_text()) | {"dtype": "float32"}
    stored, rng = load_file(tmp_path / "model.safetensors"), np.random.default_rng(5)
    quantised = {n: t for n, t in stored.items() if ".experts." not in n}
    plain = dict(quantised)
    for name, extents in (("gate_up_proj", (16, 64, 64)), ("down_proj", (16, 32, 64))):
        name = "model.layers.0.mlp.experts." + name
        codes = torch.tensor(rng.normal(size=extents), dtype=torch.float32).to(torch.float8_e4m3fn)
        scale = torch.tensor(rng.uniform(0.1, 0.2, shape), dtype=torch.float32)
        quantised |= {name: codes, name + "_weight_scale": scale, name + "_input_scale": torch.tensor(1.0)}
        plain[name] = codes.float() * scale.reshape(-1, 1, 1)
    (tmp_path / "plain").mkdir()
    whole = write(tmp_path / "plain", plain, **config)
    (tmp_path / "whole").mkdir()
    checkpoint = write(tmp_path / "whole", quantised, {"quant_method": "modelopt", "quant_algo": "FP8"}, **config)
    for (_, ours), (_, theirs) in zip(
        *(stream_layers(one, describe(one), [0]) for one in (checkpoint, whole)), strict=True
    ):
        for mine, expected in zip(ours.experts, theirs.experts, strict=True):
            np.testing.assert_array_equal(mine.gate, expected.gate)
            np.testing.assert_array_equal(mine.up, expected.up)
            np.testing.assert_array_equal(mine.down, expected.down)
    assert describe_decoder(checkpoint, describe(checkpoint))
    pruned = prune(str(tmp_path / "whole"), str(tmp_path / "pruned"), experts=Fraction(1, 2))
    [kept] = pruned.kept_experts.values()
    checkpoint = open_checkpoint(tmp_path / "pruned")
    [(_, after)] = stream_layers(checkpoint, describe(checkpoint), [0])
    np.testing.assert_array_equal(after.experts[3].down, theirs.experts[kept[3]].down)


def test_some_layers_may_be_plain(tmp_path):
    """Kept in full precision, by the config's list or without it, as are all but experts here."""
    tiny.make_checkpoint("qwen3_moe", tmp_path, **SMALL | dict(num_hidden_layers=2))
    quantised, plain = quantise(tmp_path, "fp8 blocks", dtype="bfloat16")
    kept = [name for name in plain if "layers.1.mlp.experts" in name]
    tensors = load_file(quantised.folder / "model.safetensors")
    mixed = {n: t for n, t in tensors.items() if n.removesuffix("_scale_inv") not in kept}
    mixed |= {n: t for n, t in load_file(plain.folder / "model.safetensors").items() if n in kept}
    for ignored in ([], ["model.layers.1.mlp"]):
        config = {k: v for k, v in quantised.config.items() if k != "quantization_config"}
        settings = CASES["fp8 blocks"].config | {"modules_to_not_convert": ignored}
        assert profile(write(quantised.folder, mixed, settings, **config)) == profile(plain)


def test_groups_of_modules_may_differ(tmp_path):
    """compressed-tensors: settings for modules by name, and others for the rest."""
    rng, config = np.random.default_rng(6), dict(CASES["compressed int4"].config)
    rows = CASES["compressed fp8 rows"]
    named = rows.config["config_groups"]["group_0"] | {"targets": ["re:.*down_proj"], "format": "float-quantized"}
    config["config_groups"] = config["config_groups"] | {"group_1": named}
    up, down = CASES["compressed int4"](rng, NAME, 16, 64), rows(rng, NAME.replace("gate", "down"), 64, 16)
    checkpoint = write(tmp_path, up.tensors | down.tensors, config, dtype="float32")
    np.testing.assert_array_equal(read(checkpoint), up.values)
    np.testing.assert_array_equal(read(checkpoint, NAME.replace("gate", "down")), down.values)


def test_refuses_two_settings_for_one_weight(tmp_path):
    tensors, config = (
        CASES["compressed int4"](np.random.default_rng(6), NAME, 16, 64).tensors,
        CASES["compressed int4"].config,
    )
    [group] = config["config_groups"].values()
    checkpoint = write(
        tmp_path, tensors | {"lm_head.weight": torch.ones(2)}, config | {"config_groups": {"a": group, "b": group}}
    )
    assert checkpoint.tensors["lm_head.weight"].scheme == Plain()
    with pytest.raises(InputError, match="several groups of settings hold for"):
        checkpoint.tensors[NAME]


def rename_keys(case, quant_method, **more):
    """The case's settings as another tool writes them."""
    return {key: CASES[case].config[key] for key in ("bits", "group_size")} | more | {"quant_method": quant_method}


OLD_MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
INT4 = CASES["compressed int4"].config
FORMS = {
    "side file": ("modelopt nvfp4", None, {"hf_quant_config.json": OLD_MODELOPT}),
    "older shape": ("modelopt nvfp4", {"quantization_config": OLD_MODELOPT}, {}),
    "method of vLLM": (
        "modelopt fp8",
        {"quantization_config": {"quant_method": "modelopt_x", "quant_algo": "fp8"}},
        {},
    ),
    "no method": ("modelopt fp8", {"quantization_config": {"quant_algo": "FP8"}}, {}),
    "weights alone": (
        "modelopt nvfp4",
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}},
        {},
    ),
    "compression_config": ("compressed int4", {"compression_config": INT4}, {}),
    "compression_config, nested": ("compressed int4", {"compression_config": {"quantization_config": INT4}}, {}),
    "AutoRound as GPTQ": (
        "gptq",
        {"quantization_config": rename_keys("gptq", "auto-round", packing_format="auto_round:auto_gptq")},
        {},
    ),
    "AutoRound as AWQ": (
        "awq",
        {"quantization_config": rename_keys("awq", "intel/auto-round", packing_format="auto_round:auto_awq")},
        {},
    ),
    "AutoRound, own bits": (
        "gptq int8 rows",
        {
            "quantization_config": rename_keys("gptq", "auto-round")
            | {"extra_config": {NAME.removesuffix(".weight"): {"bits": 8, "group_size": -1}, "gate": {"bits": 16}}}
        },
        {},
    ),
    "GPTQModel, own bits": (
        "gptq int8 rows",
        {
            "quantization_config": CASES["gptq"].config
            | {"dynamic": {"-:.*gate$": {}, "+:.*gate_proj": {"bits": 8, "group_size": -1}, ".*": {"bits": 4}}}
        },
        {},
    ),
    "Quark": (
        "compressed fp8 rows",
        {"quantization_config": {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp8_e4m3"}}}},
        {},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_storage_under_other_settings(form, tmp_path):
    case, config, files = FORMS[form]
    tensors, values = CASES[case](np.random.default_rng(0), NAME, 48, 96)
    for file, content in files.items():
        (tmp_path / file).write_text(json.dumps(content))
    checkpoint = write(tmp_path, tensors, dtype="float32", **(config or {}))
    np.testing.assert_array_equal(read(checkpoint), values)


MIXED = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}


@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize("spelling", ["model.", "model.language_model.", "language_model.model."])
def test_modelopt_lists_modules_with_algorithms_of_their_own(spelling, side, tmp_path):
    """One by one, by the module around them, and for experts without the expert's number."""
    rng, matrices = np.random.default_rng(0), {}
    for name, case in (
        ("layers.0.self_attn.q_proj", "modelopt fp8"),
        ("layers.0.mlp.experts.3.gate_proj", "modelopt nvfp4"),
        ("layers.1.mlp.experts.3.gate_proj", "modelopt nvfp4"),
    ):
        matrices[f"model.language_model.{name}.weight"] = CASES[case](
            rng, f"model.language_model.{name}.weight", 48, 96
        )
    listed = {
        f"{spelling}layers.0.self_attn.q_proj": {"quant_algo": "FP8"},
        f"{spelling}layers.0.mlp.experts": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
        f"{spelling}layers.1.mlp.gate_proj": {"quant_algo": "NVFP4", "group_size": 16},
    }
    if spelling == "model.":  # as tools name modules of a language model alone
        matrices = {
            new: CASES["modelopt fp8" if "attn" in new else "modelopt nvfp4"](rng, new, 48, 96)
            for new in (name.replace("language_model.", "") for name in matrices)
        }
    if side:
        (tmp_path / "hf_quant_config.json").write_text(
            json.dumps({"quantization": MIXED | {"quantized_layers": listed}})
        )
    tensors = {part: tensor for matrix in matrices.values() for part, tensor in matrix.tensors.items()}
    plain = {"model.layers.2.mlp.experts.3.gate_proj.weight": torch.ones(4, 4)}
    checkpoint = write(
        tmp_path, tensors | plain, MIXED | ({} if side else {"quantized_layers": listed}), dtype="float32"
    )
    for name, matrix in matrices.items():
        np.testing.assert_array_equal(read(checkpoint, name), matrix.values)
    assert checkpoint.tensors[next(iter(plain))].scheme == Plain()
    assert set(checkpoint.tensors) >= matrices.keys()


def test_modelopt_blocks_and_powers_of_two(tmp_path):
    """FP8_PB_WO: scales [down, 1, across, 1] of blocks of 128; MXFP8: bytes that are exponents, for 32 of a row."""
    case = CASES["modelopt fp8"]._replace(settings=dict(block=(128, 128), ending="_scale", shape=(2, 1, 3, 1)))
    tensors, values = case(np.random.default_rng(1), NAME, 130, 300)
    settings = {"quant_method": "modelopt", "quant_algo": "fp8_pb_wo"}
    np.testing.assert_array_equal(read(write(tmp_path, tensors, settings, dtype="float32")), values)
    weight = torch.ones(2, 64).to(torch.float8_e4m3fn)
    tensors = {NAME: weight, NAME + "_scale": torch.tensor([[126, 127], [128, 129]], dtype=torch.uint8)}
    for settings in ({"quant_method": "modelopt", "quant_algo": "MXFP8"}, {"quant_method": "mxfp8"}):
        found = read(write(tmp_path, tensors, settings, dtype="float32"))
        assert found[:, ::32].tolist() == [[0.5, 1.0], [2.0, 4.0]]


def change(case, **settings):
    return lambda tensors: (CASES[case].config | settings, tensors)


def without(case, ending):
    return lambda tensors: (CASES[case].config, {n: t for n, t in tensors.items() if not n.endswith(ending)})


def replace(case, ending, new):
    return lambda tensors: (CASES[case].config, {n: new(t) if n.endswith(ending) else t for n, t in tensors.items()})


def weights_group(**settings):
    return {"group_0": {"targets": ["Linear"], "weights": settings}}


@pytest.mark.parametrize(
    ("case", "damage", "message"),
    [
        ("gptq", change("gptq", quant_method="bitsandbytes"), "quant_method 'bitsandbytes' is not supported; .* awq"),
        ("gptq", change("gptq", quant_method=["gptq"]), "quant_method .* is not supported"),
        ("gptq", change("gptq", bits=3), r"quantization_config \(gptq\): bits 3 is not supported; supported are 4, 8"),
        ("gptq", change("gptq", bits=True), "bits True is not supported"),
        ("gptq", change("gptq", group_size=0), "group_size is 0"),
        ("gptq", change("gptq", group_size="16"), "group_size is '16', expected int"),
        ("gptq", change("gptq", group_size=32), "shapes do not fit"),
        ("gptq", change("gptq", checkpoint_format="marlin"), "checkpoint_format 'marlin' is not supported"),
        ("gptq", change("gptq", dynamic={"+:.*down.*": {"bits": 3}}), r"dynamic, \+:.*: bits 3 is not supported"),
        ("gptq", change("gptq", dynamic={"+:(": {"bits": 8}}), "dynamic.* is not a list of names and patterns"),
        ("gptq", change("gptq", quant_method=None), "no quant_method, as in MLX's checkpoints"),
        ("awq", change("awq", version="gemv"), "version 'gemv' is not supported; supported are gemm"),
        ("awq", without("awq", "qzeros"), "gate_proj.qzeros is missing beside .*gate_proj.qweight"),
        ("fp8 blocks", change("fp8 blocks", weight_block_size=[128]), r"weight_block_size is \[128\]"),
        ("fp8 blocks", change("fp8 blocks", weight_block_size=[16, 16]), r"shapes do not fit .*\[2, 3\]"),
        ("fp8 blocks", change("fp8 blocks", weight_block_size=None), "shapes do not fit"),
        ("fp8 blocks", change("fp8 blocks", ignored_layers=["experts.0"]), "says that it is not"),
        ("fp8 blocks", change("fp8 blocks", ignored_layers=["re:.*gate_proj"]), "says that it is not"),
        ("fp8 blocks", change("fp8 blocks", ignored_layers=["re:("]), "ignored_layers is not a list of names"),
        ("fp8 blocks", change("fp8 blocks", ignored_layers=[7]), "ignored_layers is not a list of names"),
        ("fp8 blocks", replace("fp8 blocks", "weight", lambda t: t.bfloat16()), "is bfloat16; .* allows float8_e4m3fn"),
        ("fp8 blocks", replace("fp8 blocks", "_inv", lambda t: t.int()), "is int32; .* allows float32"),
        ("compressed int4", change("compressed int4", format="marlin-24"), "format 'marlin-24' is not supported"),
        ("compressed int4", change("compressed int4", config_groups={}), "config_groups is empty"),
        ("compressed int4", change("compressed int4", config_groups=weights_group(num_bits=3)), "num_bits 3 is not"),
        (
            "compressed int4",
            change("compressed int4", sparsity_config={"format": "sparse-24-bitmask"}),
            "sparsity_config: format 'sparse-24-bitmask' is not supported",
        ),
        (
            "compressed int4",
            lambda tensors: (CASES["compressed int4"].config, tensors | {NAME: torch.zeros(48, 96)}),
            "which one counts",
        ),
        ("modelopt fp8", change("modelopt fp8", quant_algo="W4A8_AWQ"), "quant_algo 'W4A8_AWQ' is not supported"),
        ("modelopt fp8", change("modelopt fp8", quant_algo="MIXED_PRECISION"), "there is no quantized_layers with"),
        (
            "gptq",
            change("gptq", quant_method="auto-round", packing_format="auto_round:fp8"),
            "packing_format .* is not",
        ),
        ("gptq", change("gptq", quant_method="auto-round", data_type="mx_fp"), "data_type 'mx_fp' is not supported"),
        ("gptq", change("gptq", quant_method="quark"), "weight: dtype None is not supported; supported are fp8_e4m3"),
    ],
)
def test_refuses(case, damage, message, tmp_path):
    config, tensors = damage(CASES[case](np.random.default_rng(7), NAME, 48, 96).tensors)
    with pytest.raises(InputError, match=message) as caught:
        write(tmp_path, tensors, config).tensors[NAME]
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_refuses_a_type_that_is_none(tmp_path):
    with pytest.raises(InputError, match="dtype 'int4': weights cannot be dequantised to that type"):
        write(tmp_path, {"x": torch.zeros(1)}, {"quant_method": "fp8"}, torch_dtype="int4").tensors  # noqa: B018


def test_element_type_is_the_language_models(tmp_path):
    tensors = CASES["fp8 tensor"](np.random.default_rng(8), NAME, 4, 4).tensors
    for config, expected in (({}, "bfloat16"), ({"torch_dtype": "float16"}, "float16")):
        checkpoint = write(tmp_path, tensors, {"quant_method": "fp8"}, dtype="bfloat16", text_config=config)
        assert checkpoint.tensors[NAME].dtype.name == expected


def test_names_are_matched_by_whole_components(tmp_path):
    """`gate` in the list of an AWQ checkpoint is the router, and not `gate_proj`; a router is plain."""
    tensors = CASES["awq"](np.random.default_rng(9), NAME, 16, 16).tensors | {"mlp.gate.weight": torch.ones(2, 2)}
    stored = write(tmp_path, tensors, CASES["awq"].config).tensors
    assert stored[NAME].scheme != Plain() and stored["mlp.gate.weight"].scheme == Plain()


def test_refuses_a_quantised_router(tmp_path):
    tiny.make_checkpoint("qwen3_moe", tmp_path, **SMALL)
    quantised, _ = quantise(tmp_path, "fp8 tensor", dtype="bfloat16")
    tensors = load_file(quantised.folder / "model.safetensors")
    router = "model.layers.0.mlp.gate.weight"
    tensors |= {router: tensors[router].to(torch.float8_e4m3fn), router + "_scale": torch.tensor(1.0)}
    config = {k: v for k, v in quantised.config.items() if k != "quantization_config"}
    with pytest.raises(InputError, match=f"router {router} is quantised"):
        describe(write(quantised.folder, tensors, {"quant_method": "fp8"}, **config))


@pytest.mark.parametrize(
    ("case", "ending", "damage"),
    [
        ("fp8 blocks", "0.up_proj.weight", lambda t: torch.full_like(t.view(torch.uint8), 0x7F).view(t.dtype)),
        ("fp8 blocks", "0.up_proj.weight_scale_inv", lambda t: t * float("inf")),
        ("gptq", "0.up_proj.g_idx", lambda t: t + 4),
        ("gptq", "0.up_proj.g_idx", lambda t: t - 1),
        ("compressed int4", "0.up_proj.weight_shape", lambda t: t - 1),
        ("compressed mxfp4", "0.up_proj.weight_scale", lambda t: torch.full_like(t, 255)),
    ],
)
def test_damaged_values_are_refused_by_name(case, ending, damage, tmp_path):
    tiny.make_checkpoint("qwen3_moe", tmp_path, **SMALL)
    quantised, _ = quantise(tmp_path, case, dtype="bfloat16")
    tensors = load_file(quantised.folder / "model.safetensors")
    tensors = {n: damage(t) if n.endswith("experts." + ending) else t for n, t in tensors.items()}
    config = {k: v for k, v in quantised.config.items() if k != "quantization_config"}
    checkpoint = write(quantised.folder, tensors, CASES[case].config, **config)
    with pytest.raises(InputError, match="experts.0.up_proj.weight holds NaN or Inf"):
        list(stream_layers(checkpoint, describe(checkpoint), [0]))
