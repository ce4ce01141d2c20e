import hashlib
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import safetensors.torch
import torch

from dlrm.checkpoint import CheckpointInfo, Position, read_info, save_checkpoint, verify
from dlrm.config import ModelConfig
from dlrm.errors import EnvironmentFaultError, UserError

INFO = CheckpointInfo(Position(1, 2, 3), ModelConfig(), "features", "sgd", "rows", 128)
TENSORS = {
    "model.table": torch.arange(6.0).reshape(3, 2),
    "model.column": torch.arange(6.0).reshape(3, 2)[:, 1],  # not contiguous
    "model.scalar": torch.tensor(7.0),
    "model.empty": torch.zeros(0, 4),
}


def test_safetensors_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, TENSORS, INFO)
    read = safetensors.torch.load_file(path)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(read[name], tensor)
    assert read_info(path) == INFO
    assert sorted(tmp_path.iterdir()) == [path]
    # Tensors begin at a multiple of 8 bytes.
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_an_extra_name_order_or_byte_is_no_part_of_the_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_checkpoint(tmp_path / name, TENSORS, INFO)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, TENSORS, INFO)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="cannot be read as a checkpoint"):
            read_info(path)


def test_a_header_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        read_info(path)


def test_a_full_disk_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, TENSORS, INFO)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(EnvironmentFaultError, match=r"No space left.*Free some space"):
        save_checkpoint(path, {"model.table": torch.ones(3)}, INFO)
    assert path.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [path]


def test_the_safetensors_of_others_are_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file(TENSORS | {"model.column": torch.ones(3)}, tmp_path / "x")
    with pytest.raises(UserError, match="is not a checkpoint of dlrm"):
        read_info(tmp_path / "x")


def test_every_flipped_bit_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    checksum = save_checkpoint(path, TENSORS, INFO)
    content = path.read_bytes()
    assert verify(path) == checksum
    assert content.count(checksum.encode()) == 1
    zeroed = content.replace(checksum.encode(), b"0" * 64)
    assert hashlib.sha256(zeroed).hexdigest() == checksum
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError):
            verify(path)


def test_a_checkpoint_of_format_1_1_has_no_checksum_and_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    for version in ("1.0", "1.1", "1.2", "1.3", "1.4"):
        metadata = {"dlrm": msgspec.json.encode(replace(INFO, format_version=version)).decode()}
        safetensors.torch.save_file({"model.table": torch.ones(3)}, path, metadata)
        assert read_info(path).position == INFO.position
        if version in ("1.2", "1.3", "1.4"):
            with pytest.raises(UserError, match="is damaged: its checksum is missing"):
                verify(path)
        else:
            assert verify(path) == ""
