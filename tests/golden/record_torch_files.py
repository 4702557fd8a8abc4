"""Records tests/golden/torch_files/*.bin with PyTorch itself.

Each holds the same small tensors in one of the layouts that published checkpoints
have. The tests of this project only read the files; run this again after changing
the tensors:

  python3 -m venv /tmp/torch
  /tmp/torch/bin/pip install torch==2.13.0
  /tmp/torch/bin/python tests/golden/record_torch_files.py
"""

import pathlib

import torch


def main() -> None:
    """Writes the files beside this one."""
    folder = pathlib.Path(__file__).with_name("torch_files")
    folder.mkdir(exist_ok=True)
    linear = torch.nn.Linear(3, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.arange(6.0).reshape(2, 3))
        linear.bias.copy_(torch.tensor([0.5, -1.5]))
    tensors = linear.state_dict()  # an OrderedDict with attributes
    matrix = torch.arange(12.0).reshape(3, 4)
    tensors["transposed"] = matrix.T
    tensors["row"] = matrix[1]
    tensors["half"] = torch.tensor([0.5, -2.0], dtype=torch.float16)
    tensors["bfloat16"] = torch.tensor([1.0, -3.140625], dtype=torch.bfloat16)
    tensors["double"] = torch.tensor([[1e300]], dtype=torch.float64)
    tensors["long"] = torch.tensor([1, -(2**40)])
    tensors["bool"] = torch.tensor([True, False])
    tensors["scalar"] = torch.tensor(7.0)
    tensors["empty"] = torch.zeros(0, 3)
    tensors["parameter"] = torch.nn.Parameter(torch.tensor([4.0]))
    for name, zipped in (("zip.bin", True), ("legacy.bin", False)):
        torch.save(tensors, folder / name, _use_new_zipfile_serialization=zipped)
        print(f"{folder / name}: torch {torch.__version__}, {len(tensors)} tensors")


if __name__ == "__main__":
    main()
