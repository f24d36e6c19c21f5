"""Damage to JSON and to safetensors files, at random: bytes changed, or values of the JSON."""

import copy
import json
import struct

VALUES = [0, 1, 2, 3, -1, 16, 2**31, 2**63, 2**64, 10**30, 1.5, 1e308, True, None, [], {}, [1], [-1, 2], [[]], {"a": 1}]
VALUES += [
    "",
    "gate",
    "F32",
    "BF16",
    "F64",
    "U8",
    "qwen3_moe",
    "fp8",
    "awq",
    "gptq",
    "gptq_v2",
    "re:(",
    "re:.*",
    "\udc80",
]
SNIPPETS = [b"", b"\0", b"{", b"}", b"[", b'"', b",", b"9" * 20, b"9" * 5000, b"-1", b"1e999", b"NaN", b"null", b"\xff"]
SNIPPETS += [b'"a":1,', b"[" * 3000, b'"\\ud800"', b" ", b"\xef\xbb\xbf", b"Infinity", b"/*", b"\n"]


def mutate_bytes(rng, data):
    data, place = bytearray(data), rng.randrange(len(data))
    end = min(len(data), place + rng.choice([0, 1, 1, 2, 8, 50]))
    match rng.randrange(4):
        case 0:
            data[place] ^= 1 << rng.randrange(8)
        case 1:
            data[place:end] = rng.choice(SNIPPETS)
        case 2:
            del data[place : rng.choice([end, end, len(data)])]
        case 3:
            data[place:place] = data[end : end + rng.choice([1, 8, 60])]
    return bytes(data)


def mutate_json(rng, document):
    """Change, remove, add, rename or swap one value, anywhere."""
    document = copy.deepcopy(document)
    node, key = find_place(rng, document)
    other, other_key = find_place(rng, document)
    match rng.randrange(7):
        case 0:
            node[key] = rng.choice(VALUES)
        case 1:
            del node[key]
        case 2:
            node[key], other[other_key] = copy.deepcopy(other[other_key]), copy.deepcopy(node[key])
        case 3 if isinstance(node, dict):
            node[rng.choice([key + "x", other_key, "", "model.layers.0.mlp.gate.weight"])] = node.pop(key)
        case 4 if isinstance(node[key], int | float):
            node[key] += rng.choice([-1, 1, 2, 8, 0.5])
        case 5 if isinstance(node[key], str):
            node[key] = node[key][: rng.randrange(len(node[key]) + 1)] + rng.choice(["", "x", "4"])
        case _ if isinstance(node, dict):
            node[str(rng.choice(VALUES))] = copy.deepcopy(other[other_key])
        case _:
            node.append(copy.deepcopy(node[key]))
    return document


def find_place(rng, document):
    places, nodes = [], [document]
    while nodes:
        node = nodes.pop()
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                nodes.append(node[key])
    return rng.choice(places)


def mutate_shard(rng, data):
    length = struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.4:
        head = mutate_bytes(rng, data[: 8 + length])
        return head + data[8 + length :] if rng.random() < 0.9 else mutate_bytes(rng, data)
    header = json.dumps(mutate_json(rng, json.loads(data[8 : 8 + length]))).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def mutate_text(rng, data):
    if rng.random() < 0.4:
        return mutate_bytes(rng, data)
    return json.dumps(mutate_json(rng, json.loads(data))).encode()
