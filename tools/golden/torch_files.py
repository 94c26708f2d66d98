"""Writes tests/golden/torch: files of torch.save that the restricted reader accepts, and such that it must refuse.

    python3 -m venv venv && venv/bin/pip install torch numpy && venv/bin/python tools/golden/torch_files.py tests/golden/torch

`contents.json` says what is in the accepted ones. Made with torch 2.x on a CPU; the bytes differ from version to version.
"""

import argparse
import collections
import gzip
import io
import json
import os
import pickle
import sys

import torch

# A file of our own must not be run by the tests of others either: the command writes nothing and ends at once.
HARMLESS = "true"


class Code:
    def __reduce__(self):
        return (os.system, (HARMLESS,))


class Thing:
    def __init__(self):
        self.name = "x"


def numbers(*shape, dtype=torch.float32):
    count = 1
    for extent in shape:
        count *= extent
    return torch.arange(count, dtype=torch.float32).reshape(shape).sub(3).mul(0.5).to(dtype)


def features(length, width, padded):
    """What SpecForge's script for hidden states writes of one row, padded to the longest of its batch."""
    ids = torch.zeros(padded, dtype=torch.int64)
    ids[:length] = torch.arange(5, 5 + length)
    mask = torch.zeros(padded, dtype=torch.int64)
    mask[2:length] = 1
    return {
        "input_ids": ids,
        "loss_mask": mask,
        "hidden_state": numbers(1, padded, width, dtype=torch.bfloat16),
        "aux_hidden_state": numbers(1, padded, 3 * width, dtype=torch.bfloat16),
    }


def values(tensor):
    kind = tensor.to(torch.float64) if tensor.dtype.is_floating_point else tensor.to(torch.int64)
    return {"dtype": str(tensor.dtype).split(".")[1], "shape": list(tensor.shape), "values": kind.flatten().tolist()}


def main(folder):
    os.makedirs(folder, exist_ok=True)
    path = lambda name: os.path.join(folder, name)
    contents = {}

    wide = numbers(1, 6, 4)
    tensors = {
        "f64": numbers(2, 3, dtype=torch.float64),
        "f32": numbers(2, 3),
        "f16": numbers(3, dtype=torch.float16),
        "bf16": numbers(3, dtype=torch.bfloat16),
        "i64": torch.tensor([-1, 2**40]),
        "i32": torch.tensor([-7, 7], dtype=torch.int32),
        "i16": torch.tensor([-300], dtype=torch.int16),
        "i8": torch.tensor([-5, 5], dtype=torch.int8),
        "u8": torch.tensor([0, 255], dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "transposed": numbers(2, 3).T,
        "sliced": wide[:, 1:3],
        "column": wide[0, :, 2],
    }
    other = {"none": None, "true": True, "int": -5, "long": 2**40, "negative": -(2**40), "float": 0.25, "text": "größer",
             "list": [1, [2, "x"]], "tuple": (1, 2.5), "size": torch.Size([2, 3])}
    torch.save({**tensors, "other": other}, path("types.pt"))
    contents["types.pt"] = {name: values(tensor) for name, tensor in tensors.items()}
    torch.save({**tensors, "other": other}, path("protocol4.pt"), pickle_protocol=4)
    contents["protocol4.pt"] = contents["types.pt"]

    torch.manual_seed(0)
    model = torch.nn.Sequential(collections.OrderedDict(fc=torch.nn.Linear(3, 2), norm=torch.nn.LayerNorm(2)))
    torch.save(model.state_dict(), path("state_dict.bin"))
    contents["state_dict.bin"] = {name: values(tensor) for name, tensor in model.state_dict().items()}
    torch.save({"draft_state_dict": dict(model.named_parameters()), "global_step": 7, "strategy": "eagle3"},
               path("training_state.pt"))
    contents["training_state.pt"] = {name: values(tensor.detach()) for name, tensor in model.named_parameters()}

    torch.save(features(5, 2, 8), path("data_0.ckpt"))
    buffer = io.BytesIO()
    torch.save(features(3, 2, 3), buffer)
    with open(path("data_1.ckpt.gz"), "wb") as file, gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as packed:
        packed.write(buffer.getvalue())

    torch.save({"x": numbers(2)}, path("legacy.pt"), _use_new_zipfile_serialization=False)
    with open(path("plain.pt"), "wb") as file:
        pickle.dump({"x": [1, 2]}, file)
    torch.save({"x": Code()}, path("code.pt"))
    torch.save({"x": Thing()}, path("object.pt"))
    torch.save({"x": argparse.Namespace(a=1)}, path("namespace.pt"))
    torch.save({"x": {1, 2}}, path("set.pt"))

    with open(path("contents.json"), "w") as file:
        json.dump(contents, file, indent=1)
        file.write("\n")


main(sys.argv[1])
