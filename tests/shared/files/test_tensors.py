"""Finished tensors stay, bit for bit, and a torn one is none."""

import torch
from unmemorize.shared.files.tensors import TensorFolder


def test_what_was_put_is_known_again_bit_for_bit(tmp_path):
    folder = TensorFolder(tmp_path / "new")
    assert folder.known() == {}
    tensors = {3: torch.randn(2, 5), 0: torch.zeros(2, 5), 12: torch.randn(5, 2).T}
    for number, tensor in tensors.items():
        folder.put(number, tensor)
    known = TensorFolder(tmp_path / "new").known()
    assert list(known) == [0, 3, 12]
    assert all(torch.equal(known[number], tensor) for number, tensor in tensors.items())
    folder.remove()
    assert not (tmp_path / "new").exists()


def test_a_file_that_a_kill_left_half_is_not_taken(tmp_path):
    folder = TensorFolder(tmp_path)
    folder.put(0, torch.ones(3))
    (tmp_path / ".000001.safetensors.77.part").write_bytes(b"half")
    assert list(folder.known()) == [0]
