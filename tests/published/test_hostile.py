"""Files that are made to harm, or merely broken, are refused at once, by name and without effect."""

import builtins
import io
import os
import pickle
import struct
import time
import zipfile

import numpy as np
import pytest
import torch

from mambastyle import published
from mambastyle.published import PublishedError


class Call:
    """Pickled, this calls `function`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def refused(path, match: str) -> None:
    # Of this process: the clock on the wall would measure what else the machine does.
    start = time.process_time()
    with pytest.raises(PublishedError, match=match):
        published.load(path)
    assert time.process_time() - start < 1


def write(path, data: bytes):
    path.write_bytes(data)
    return path


@pytest.fixture
def mark(tmp_path):
    """A file that a hostile pickle would make; the test fails if it is there in the end."""
    path = tmp_path / "mark"
    yield path
    assert not path.exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_commands(tmp_path, mark, protocol):
    payload = (
        {"G_ema": Call(os.system, f"touch {mark}")} if protocol > 1 else Call(os.system, f"touch {mark}")
    )
    file = write(tmp_path / "a.pkl", pickle.dumps(payload, protocol=protocol))
    refused(file, r"(posix|nt)\.system")


def test_eval_and_exec(tmp_path, mark):
    for name in ("eval", "exec", "getattr", "__import__"):
        call = Call(getattr(builtins, name), f"open({str(mark)!r}, 'w')")
        refused(write(tmp_path / "a.pkl", pickle.dumps(call, protocol=4)), rf"builtins\.{name}")


@pytest.mark.parametrize("container", ["bare", "legacy", "zip"])
def test_functions_of_torch_and_numpy_with_effects(tmp_path, mark, container):
    for call in (Call(torch.hub.load, "a", "b"), Call(np.load, "x"), Call(torch.save, 1, str(mark))):
        path = tmp_path / "a.pt"
        if container == "bare":
            path.write_bytes(pickle.dumps(call))
        else:
            torch.save(call, path, _use_new_zipfile_serialization=container == "zip")
        refused(path, "refused: it names")


def test_a_hostile_pickle_inside_a_storage(tmp_path, mark):
    blob = io.BytesIO()
    torch.save(Call(os.system, f"touch {mark}"), blob, _use_new_zipfile_serialization=False)
    nested = Call(torch.storage._load_from_bytes, blob.getvalue())
    refused(write(tmp_path / "a.pkl", pickle.dumps({"G_ema": nested}, protocol=4)), r"(posix|nt)\.system")
    # A pickle where a storage belongs is no storage, whatever it holds.
    nested = Call(torch.storage._load_from_bytes, pickle.dumps(Call(os.system, f"touch {mark}")))
    refused(write(tmp_path / "b.pkl", pickle.dumps(nested, protocol=4)), "refused")


def test_names_that_are_put_together_or_reached_through_attributes(tmp_path, mark):
    refused(write(tmp_path / "a.pkl", b"\x80\x04\x8c\x02os\x8c\x06system\x93."), r"'os\.system'")
    refused(
        write(tmp_path / "b.pkl", b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93."),
        "OrderedDict",
    )
    refused(write(tmp_path / "c.pkl", b"\x80\x04]]\x93." + bytes(16)), "something else than text")
    refused(write(tmp_path / "d.pkl", b"\x80\x02(S'x'\nios\nsystem\n."), "opcode|os.system")
    refused(write(tmp_path / "e.pkl", b"\x80\x02\x82\x01." + bytes(16)), "opcode")


CLAIMS = {
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 10 << 30),
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 10 << 30),
    "text": b"\x80\x04\x8d" + struct.pack("<Q", 10 << 30),
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 10 << 30),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_lengths_that_the_file_does_not_have(tmp_path, claim):
    refused(write(tmp_path / "a.pkl", CLAIMS[claim] + bytes(100)), "claims 10,737,418,240 bytes")


def test_memo_of_four_billion_entries(tmp_path):
    refused(write(tmp_path / "a.pkl", b"\x80\x04Nr\xff\xff\xff\xff." + bytes(20)), "no known kind")


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_that_claim_more_than_their_storage(tmp_path, zipped):
    tensor = torch.zeros(1).expand(10 << 30)
    path = tmp_path / "a.pt"
    torch.save({"0.weight": tensor, "42.weight": tensor}, path, _use_new_zipfile_serialization=zipped)
    refused(path, "claims 10737418240 numbers")


def test_many_tensors_over_one_storage(tmp_path):
    shared = torch.zeros(1 << 20)
    names = ["0.weight", "42.weight", *(f"{i}.bias" for i in range(500))]
    torch.save({name: shared for name in names}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "made to harm")


def test_a_storage_that_claims_another_length(tmp_path):
    torch.save({"0.weight": torch.zeros(300)}, tmp_path / "a.pt")
    path = tmp_path / "b.pt"
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            # 300 as the pickle writes it, for a number of 4 bytes of about two thousand million.
            new.writestr(entry.filename, data.replace(b"M,\x01", b"J\xff\xff\xff\x7f"))
    refused(path, "claims 2147483647 numbers|sensible numbers")


def test_compressed_members_are_refused_before_they_grow(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(50_000_000))
    refused(tmp_path / "a.pt", "compressed")


def test_torchscript_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02N.")
        file.writestr("archive/code/__torch__.py", "")
    refused(tmp_path / "a.pt", "TorchScript")


def test_arrays(tmp_path):
    np.save(tmp_path / "a.npy", np.array([Call(os.system, "true")], dtype=object), allow_pickle=True)
    refused(tmp_path / "a.npy", "no plain numbers")
    np.save(tmp_path / "b.npy", np.zeros((1, 512)))
    data = (tmp_path / "b.npy").read_bytes().replace(b"(1, 512)", b"(9999999999, 99)"[:8])
    refused(write(tmp_path / "c.npy", data), "refused")
    big = (tmp_path / "b.npy").read_bytes().replace(b"(1, 512), }       ", b"(1, 9999999999), }")
    assert b"9999999999" in big
    refused(write(tmp_path / "d.npy", big), "claims 1 x 9999999999")


def test_lists_inside_lists_cost_nothing(tmp_path):
    # Every level holds the one below twice: printed, compared or hashed it would take for ever.
    laughs = b"\x80\x04]\x94" + b"".join(
        b"]\x94(h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(60)
    )
    refused(write(tmp_path / "a.pkl", laughs + b"h\x3c\x93."), "refused")
    tuples = b"\x80\x04)\x94" + b"".join(
        b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(60)
    )
    refused(write(tmp_path / "b.pkl", tuples + b"\x8f(h\x3c\x90."), "refused")
    refused(write(tmp_path / "c.pkl", b"\x80\x04" + b"]" * 500_000 + b"a" * 499_999 + b"."), "deep")


def test_a_module_inside_itself(tmp_path):
    class Module:
        def __init__(self):
            self.state = {}

        def __reduce__(self):
            return OPEN, ({"type": "class", "class_name": "Generator", "state": self.state},)

    module = Module()
    module.state["_modules"] = {"a": module.state}
    data = pickle.dumps({"G_ema": module}, protocol=4)
    refused(write(tmp_path / "a.pkl", renamed(data)), "no module of NVIDIA")


def OPEN(meta):
    raise AssertionError("nothing may call this")


def renamed(data: bytes) -> bytes:
    """`data` with the global of this module named as NVIDIA's."""
    ours = f"\x8c{chr(len(__name__))}{__name__}".encode("latin1")
    assert data.count(ours) == 1
    theirs = b"torch_utils.persistence"
    name = b"_reconstruct_persistent_obj"
    data = data.replace(ours, b"\x8c" + bytes([len(theirs)]) + theirs)
    data = data.replace(b"\x8c\x04OPEN", b"\x8c" + bytes([len(name)]) + name)
    # Python read frames by their length, which has changed.
    start = data.index(b"\x95")
    return data[:start] + b"\x95" + struct.pack("<Q", len(data) - start - 9) + data[start + 9 :]


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.999])
def test_truncated_pickles(tmp_path, share):
    from tests.golden.cases import FOLDER

    data = (FOLDER / "stylegan2_nvidia32_cond.pkl").read_bytes()
    refused(write(tmp_path / "a.pkl", data[: int(len(data) * share)]), "truncated")


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_files_of_torch(tmp_path, zipped):
    torch.save({"0.weight": torch.zeros(5000)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    data = (tmp_path / "a.pt").read_bytes()
    for share in (0.01, 0.5, 0.98):
        refused(write(tmp_path / "b.pt", data[: int(len(data) * share)]), "truncated|damaged")


def test_other_files(tmp_path):
    refused(tmp_path / "none.pkl", "no file at")
    refused(write(tmp_path / "empty.pkl", b""), "truncated")
    refused(write(tmp_path / "text.pkl", b"hello, this is no pickle at all"), "no file of torch, numpy")
    refused(write(tmp_path / "list.pkl", pickle.dumps(list(range(40)), protocol=4)), "no known kind")
    tensorflow = b"\x80\x03cdnnlib.tflib.network\nNetwork\n)R."
    refused(write(tmp_path / "tf.pkl", tensorflow), r"legacy\.py")
