"""The packed file: identity, size, and refusal of everything that is not a whole and unaltered file."""

import json
import subprocess
import sys
import zlib

import numpy as np
import pytest
import safetensors.numpy
import torch
from deploy_tools import logits, trained
from fuzz_packed import one
from fuzz_tools import fuzz
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_deploy_layers import Plain

import empf
from empf.deploy import file as packed_file
from empf.deploy.origin import Origin
from empf.deploy.pack import PackedModel, load_packed, pack
from empf.kernels.pack import PackedWeight, signs
from empf.kernels.pack import pack as pack_weight
from empf.model_config import LATER

SETTINGS = dict(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def weights(draw):
    shape = draw(st.one_of(st.tuples(*[st.integers(1, 70)] * 2), st.tuples(*[st.integers(1, 9)] * 4)))
    values = np.random.default_rng(draw(st.integers(0, 2**32))).normal(size=shape)
    return torch.tensor(values, dtype=torch.float32), draw(st.sampled_from(["binary", "ternary"]))


@settings(max_examples=100, **SETTINGS)
@given(st.lists(weights(), min_size=1, max_size=3))
def test_pack_write_read_unpack_is_the_identity(tmp_path, layers):
    packed = {f"layer{i}": pack_weight(w, kind) for i, (w, kind) in enumerate(layers)}
    state = {f"{n}.{part}": getattr(p, part) for n, p in packed.items() for part in ("bits", "scale")}
    about = {f"{name}.bits": (p.shape, p.kind) for name, p in packed.items()}
    path = tmp_path / "net.safetensors"
    path.write_bytes(packed_file.to_bytes(packed_file.encode(state, about), {"names": ["é", '"sha256":"', "0" * 64]}))
    read, arrays = packed_file.read(path)
    found = packed_file.decode(arrays, state, about)
    assert read == {"names": ["é", '"sha256":"', "0" * 64]}
    for name, p in packed.items():
        again = PackedWeight(found[f"{name}.bits"], found[f"{name}.scale"], p.shape, p.kind)
        assert torch.equal(signs(again), signs(p)) and torch.equal(again.scale, p.scale)
        bits = p.bits if p.kind == "binary" else p.bits & ~(~p.bits << 1 & -1431655766)  # minus zero is stored as zero
        assert torch.equal(again.bits, bits)


def test_ternary_weights_take_a_fifth_of_a_byte():
    for k, size in ((1, 1), (5, 1), (6, 2), (576, 116)):
        array = packed_file._encode_bits(pack_weight(torch.randn(3, k), "ternary").bits, (3, k), "ternary")
        assert array.shape == (3, size) and array.dtype == np.uint8
    codes = torch.tensor([[0, 1, 3, 1, 3, 3]], dtype=torch.int32)  # zero, plus, minus, plus, minus, minus
    words = (codes << 2 * torch.arange(6)).sum(1, keepdim=True, dtype=torch.int32)
    assert packed_file._encode_bits(words, (1, 6), "ternary").tolist() == [[0 + 3 + 2 * 9 + 27 + 2 * 81, 2]]


def test_binary_weights_are_bits_in_order():
    w = -torch.ones(1, 11)
    w[0, [0, 9]] = 1
    assert packed_file._encode_bits(pack_weight(w).bits, (1, 11), "binary").tolist() == [[0b11111110, 0b101]]


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("kind, limit", [("binary", 1.75e6), ("ternary", 2.6e6)])
def test_a_resnet18_is_25_times_smaller_on_the_disk(kind, limit, classes, tmp_path):
    """With Mem-BN and channel attention, which have the most parameters; all of them as irregular as can be."""
    torch.manual_seed(0)
    model = empf.resnet18(num_classes=classes, weights=kind, neuron="mem_bn", seca=1)
    with torch.no_grad():
        for name, p in model.state_dict().items():
            if p.dim() <= 2 and "head" not in name:
                p.copy_(torch.randn_like(p).exp() if "running_var" in name else torch.randn_like(p))
    pack(model).save(tmp_path / "net.safetensors")
    size = (tmp_path / "net.safetensors").stat().st_size
    assert 0.9 * limit < size + (0.2e6 if classes == 10 else 0) < limit


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """(folder, bytes, state dict, bytes of another network with a header of the same length)."""
    folder = tmp_path_factory.mktemp("packed")
    packed = pack(trained(neuron="mem_bn", width=0.0625, T=2)[0])
    other = pack(trained(neuron="mem_bn", width=0.0625, T=2, weights="ternary")[0])
    return folder, packed.to_bytes(), packed.net.state_dict(), other.to_bytes()


def split(data: bytes) -> tuple[bytes, bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return data[:end], data[end:]


def corrupt(data: bytes, other: bytes, how: str, at: float, bit: int, junk: bytes) -> bytes:
    header, body = split(data)
    place = int(at * len(data))
    flip = {"header": int(at * len(header)), "length": int(at * 8), "anywhere": place}
    if how in flip:
        i = flip[how]
        return data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :]
    return {
        "truncate": data[:place],
        "other header": split(other)[0] + body,
        "other body": header + split(other)[1],
        "overwrite": data[:place] + junk + data[place + len(junk) :],
        "insert": data[:place] + junk + data[place:],
        "append": data + junk,
        "delete": data[:place] + data[place + len(junk) :],
        "only junk": junk,
    }[how]


HOW = ["header", "length", "anywhere", "truncate", "other header", "other body", "overwrite", "insert", "append"]
HOW += ["delete", "only junk"]


@settings(max_examples=1000, **SETTINGS)
@given(
    st.sampled_from(HOW), st.floats(0, 1, exclude_max=True), st.integers(0, 7), st.binary(min_size=1, max_size=200)
)  # fmt: skip
def test_a_corrupt_file_is_an_error_and_never_another_network(example, how, at, bit, junk):
    folder, data, state, other = example
    broken = corrupt(data, other, how, at, bit, junk)
    path = folder / "broken.safetensors"
    path.write_bytes(broken)
    if broken == data:
        found = load_packed(path).net.state_dict()
        assert all(torch.equal(found[name], value) for name, value in state.items())
        return
    with pytest.raises(ValueError) as error:
        load_packed(path)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 400


def resign(data: bytes, about=None, arrays=None) -> bytes:
    """A file with a right checksum whose content was changed."""
    header = json.loads(split(data)[0][8:])["__metadata__"]
    return packed_file.to_bytes(
        safetensors.numpy.load(data) if arrays is None else arrays,
        json.loads(header["about"]) if about is None else about,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"T": "x"}, {"T": 10**30}, {"T": 3}, {"T": None}, {"T": -1}, {"width": 1e308}, {"width": float("nan")},
        {"width": 10**9}, {"arch": "vgg_snn"}, {"arch": ["resnet18"]}, {"weights": "ternary"}, {"weights": "full"},
        {"num_classes": 10**18}, {"num_classes": 2.5}, {"neuron": "empf"}, {"spike_bits": {}}, {"seca": 1},
        {"unknown": 1}, {"parallel": 0.5}, {"in_channels": 2**40},
    ],
    ids=str,
)  # fmt: skip
def test_a_file_made_up_with_a_right_checksum_is_refused_too(example, changes):
    folder, data, _, _ = example
    about = json.loads(json.loads(split(data)[0][8:])["__metadata__"]["about"])
    about["model"] |= changes
    path = folder / "made_up.safetensors"
    path.write_bytes(resign(data, about))
    with pytest.raises(ValueError, match="made_up.safetensors does not hold a network of this version"):
        load_packed(path)


def test_a_file_of_an_older_version(example, tmp_path, monkeypatch):
    """Whose configuration does not have what came later."""
    path = tmp_path / "net.safetensors"
    path.write_bytes(example[1])
    packed = load_packed(path)
    older = {n: v for n, v in packed.config.to_dict().items() if n not in LATER}
    with monkeypatch.context() as then:
        then.setattr(type(packed.config), "to_dict", lambda config: older)
        then.setattr(type(packed.config), "for_checksum", lambda config: older)
        data = packed.to_bytes()
    assert b"granularity" not in data and b"granularity" in example[1]
    path.write_bytes(data)
    assert load_packed(path).fingerprint() == packed.fingerprint()


@pytest.mark.parametrize(
    "about", [[], {}, {"model": 3, "origin": {}}, {"model": {}, "origin": {"mean": "x"}}, "[" * 10]
)
def test_a_description_of_another_kind_is_refused(example, about):
    folder, data, _, _ = example
    path = folder / "about.safetensors"
    path.write_bytes(resign(data, about))
    with pytest.raises(ValueError, match="about.safetensors"):
        load_packed(path)


def test_arrays_that_do_not_fit_are_refused(example):
    folder, data, state, _ = example
    arrays = safetensors.numpy.load(data)
    numbers = zlib.decompress(arrays["parameters"])
    some = next(name for name in arrays if name.endswith(".bits"))
    as_bytes = lambda data: np.frombuffer(data, np.uint8)  # noqa: E731
    wrong = [
        {name: a for name, a in arrays.items() if name != some},
        arrays | {"more": arrays[some]},
        arrays | {some: arrays[some][:-1]},
        arrays | {some: arrays[some].astype(np.int32)},
        arrays | {"parameters": as_bytes(zlib.compress(numbers[:-4]))},
        arrays | {"parameters": as_bytes(zlib.compress(numbers + bytes(10**7)))},  # is not inflated to its end
        arrays | {"parameters": as_bytes(zlib.compress(numbers)[:-1])},
        arrays | {"parameters": as_bytes(zlib.compress(numbers) + b"1")},
        arrays | {"parameters": as_bytes(b"no zlib")},
    ]
    for i, changed in enumerate(wrong):
        path = folder / f"wrong{i}.safetensors"
        path.write_bytes(resign(data, arrays=changed))
        with pytest.raises(ValueError, match=f"wrong{i}.safetensors (does not hold|is not a packed network)"):
            load_packed(path)


def test_a_byte_above_242_is_no_ternary_weight(example):
    folder, _, _, data = example
    arrays = {name: a.copy() for name, a in safetensors.numpy.load(data).items()}
    next(a for name, a in arrays.items() if name.endswith(".bits")).flat[0] = 243
    (folder / "trits.safetensors").write_bytes(resign(data, arrays=arrays))
    with pytest.raises(ValueError, match="243"):
        load_packed(folder / "trits.safetensors")


def test_foreign_and_older_files(example):
    folder, data, _, _ = example
    path = folder / "foreign.safetensors"
    safetensors.numpy.save_file({"w": np.zeros(3, np.float32)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="is not a packed network"):
        load_packed(path)
    torch.save({"w": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="is not a packed network"):
        load_packed(path)
    path.write_bytes(data.replace(b'"version":"2"', b'"version":"1"'))
    with pytest.raises(
        ValueError, match="version '1' of the packed format .* reads 2: update empf, or pack the network again"
    ):
        load_packed(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        load_packed(folder / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="no file"):
        load_packed(folder)


def test_what_is_known_about_a_network_is_in_its_file(tmp_path):
    packed = pack(trained()[0])
    packed.origin = Origin("digits", ("zéro", "one"), (0.3,), (0.4,), (90.0, 91.25, 92.5), 3)
    packed.save(tmp_path / "deep" / "net.safetensors")
    found = load_packed(tmp_path / "deep" / "net.safetensors")
    assert found.origin == packed.origin and found.config == packed.config
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "net.safetensors"]  # nothing half-written


def test_long_names_of_many_classes_come_back(tmp_path):
    packed = pack(trained()[0])
    packed.origin = Origin(classes=tuple(f"{i} {'ä' * 60}" for i in range(5000)))  # 2 MB of header
    packed.save(tmp_path / "net.safetensors")
    assert load_packed(tmp_path / "net.safetensors").origin == packed.origin
    packed.origin = Origin(classes=("x" * packed_file.MAX_HEADER,))
    with pytest.raises(ValueError, match="give the classes shorter names"):
        packed.save(tmp_path / "net.safetensors")


def test_a_file_cannot_ask_for_all_memory(example, monkeypatch):
    """A hostile one could be inflated a thousandfold, to parameters that its configuration does call for."""
    folder, data, state, _ = example
    (folder / "large.safetensors").write_bytes(data)
    floats = sum(p.numel() for p in state.values() if p.is_floating_point())
    monkeypatch.setattr(packed_file, "MAX_NUMBERS", floats - 1)
    with pytest.raises(ValueError, match=f"large.safetensors does not hold .*the network has {floats:,} full-prec"):
        load_packed(folder / "large.safetensors")
    monkeypatch.setattr(packed_file, "MAX_NUMBERS", floats)
    assert load_packed(folder / "large.safetensors").to_bytes() == data


def test_parameters_in_half_precision_are_stored(tmp_path):
    pack(trained()[0]).bfloat16().save(tmp_path / "net.safetensors")
    found = load_packed(tmp_path / "net.safetensors").state_dict()
    for name, p in pack(trained()[0]).state_dict().items():
        assert torch.equal(found[name], p.bfloat16().float() if p.is_floating_point() else p)


def test_saving_twice_gives_the_same_file():
    packed = pack(trained()[0])
    assert packed.to_bytes() == packed.to_bytes()


def test_parameters_survive_to_the_last_bit():
    """Also those that are not numbers one would expect: tiny, large, minus zero."""
    values = torch.tensor([-0.0, 1e-45, 3.4e38, -1.0, 1 / 3])
    state = {"w.bits": pack_weight(torch.ones(1, 1)).bits, "values": values}
    about = {"w.bits": ((1, 1), "binary")}
    found = packed_file.decode(packed_file.encode(state, about), state, about)
    assert torch.equal(found["values"].view(torch.int32), values.view(torch.int32))


def test_a_loaded_network_runs_and_can_be_saved_again(tmp_path):
    model, x = trained(weights="ternary", seca=2)
    packed = pack(model)
    packed.save(tmp_path / "a.safetensors")
    again = load_packed(tmp_path / "a.safetensors")
    assert torch.equal(logits(again, x), logits(packed, x))
    assert again.to_bytes() == packed.to_bytes()


@pytest.mark.parametrize("seed", range(4))
def test_an_altered_file_is_refused_or_the_same_network(seed, tmp_path):
    """2,000 cases in all; `python tests/fuzz_packed.py 20000` for more."""
    outcomes, wrong, slowest = fuzz(one, 500, seed, tmp_path)
    assert wrong == [] and sum(outcomes.values()) == 500
    assert outcomes["refused"] > 300 and outcomes["the same network"] > 0 and outcomes["another network"] > 0


def sealed(example, tmp_path, monkeypatch, change) -> str:
    """The words of refusal for a file whose checksum and fingerprint are right; `change(state, about)` made it."""
    _, data, state, _ = example
    packed = load_packed(tmp_path / "net" if (tmp_path / "net").write_bytes(data) else None)
    about = json.loads(json.loads(split(data)[0][8:])["__metadata__"]["about"]) | {"fingerprint": "sealed"}
    state = {name: tensor.clone() for name, tensor in state.items()}
    change(state, about)
    monkeypatch.setattr(packed_file, "_check_finite", lambda name, numbers: None)
    arrays = packed_file.encode(state, packed.packed_weights())
    monkeypatch.undo()
    monkeypatch.setattr(PackedModel, "fingerprint", lambda self: "sealed")
    (tmp_path / "net").write_bytes(packed_file.to_bytes(arrays, about))
    with pytest.raises(ValueError) as error:
        load_packed(tmp_path / "net")
    return str(error.value)


def test_a_number_that_no_tensor_holds_is_refused(example):
    folder, data, _, _ = example
    about = json.loads(json.loads(split(data)[0][8:])["__metadata__"]["about"])
    about["origin"]["mean"] = [10**400]
    (folder / "long.safetensors").write_bytes(resign(data, about))
    with pytest.raises(ValueError, match=r"long.safetensors is not .*\(a whole number of 401 digits\): pack it again"):
        load_packed(folder / "long.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["scale", "gain", "shift", "threshold", "leak", "weight"])
def test_numbers_that_are_not_finite_are_refused_by_name(example, tmp_path, monkeypatch, kind, value):
    name = next(name for name in example[2] if name.endswith(f".{kind}"))

    def change(state, about):
        state[name].flatten()[-1] = value

    assert f"({name} holds numbers that are not finite)" in sealed(example, tmp_path, monkeypatch, change)


def test_a_network_with_such_numbers_is_not_saved(tmp_path):
    packed = pack(trained()[0])
    packed.net.blocks[2].conv1.bn.gain[0] = float("nan")
    with pytest.raises(ValueError, match="blocks.2.conv1.bn.gain holds numbers that are not finite"):
        packed.save(tmp_path / "net.safetensors")


@pytest.mark.parametrize(
    "changes, refused",
    [
        ({"image_size": 20000}, "image_size must be at most 4,096, got 20000"),
        ({"image_size": 10**18}, "image_size must be at most 4,096, got 1000000000000000000"),
        ({"T": 10**7}, "T must be at most 4,096, got 10000000"),
        ({"T": 4096, "image_size": 4096}, "asks for currents of 17,179,869,184 numbers for one image, of 268,435,456"),
    ],
    ids=str,
)
def test_the_work_that_a_file_may_ask_for_is_bounded(example, tmp_path, monkeypatch, changes, refused):
    """Sizes follow from the configuration by arithmetic; nothing of them is built."""
    assert refused in sealed(example, tmp_path, monkeypatch, lambda state, about: about["model"].update(changes))


def test_parameters_are_not_inflated_beyond_what_their_size_makes_likely(tmp_path, monkeypatch):
    """And a network whose parameters are that regular is stored without compression."""
    zeros = {"w.bits": pack_weight(torch.ones(1, 1)).bits, "values": torch.zeros(2**20)}
    about = {"w.bits": ((1, 1), "binary")}
    arrays = packed_file.encode(zeros, about)
    assert arrays["parameters"].size > 2**22 and not packed_file.decode(arrays, zeros, about)["values"].any()
    bomb = arrays | {"parameters": np.frombuffer(zlib.compress(bytes(2**22), 9), np.uint8)}
    with pytest.raises(ValueError, match=r"bytes would become 4,194,304 bytes of parameters"):
        packed_file.decode(bomb, zeros, about)


@pytest.mark.parametrize(
    "field, value, words",
    [("mean", [float("nan")], "mean must be finite"), ("std", [0.0], "std must be positive"),
     ("accuracy", [float("inf")], "accuracy must be finite"), ("classes", 3, "not iterable")],
)  # fmt: skip
def test_a_normalisation_that_cannot_be_is_refused(example, tmp_path, monkeypatch, field, value, words):
    assert words in sealed(example, tmp_path, monkeypatch, lambda state, about: about["origin"].update({field: value}))


def test_sentences_about_hostile_names_are_short_and_printable(example, tmp_path, monkeypatch):
    name = "\x1b]0;x\x07\n" + "x" * 10000
    words = sealed(example, tmp_path, monkeypatch, lambda state, about: about["model"].update({name: 1}))
    assert words.isprintable() and len(words) < len(str(tmp_path)) + 400 and "unknown model setting ?]0;x??xxx" in words


def test_the_fingerprint_covers_weights_and_description(example):
    """A right checksum alone does not make another network of it: activations and tensors of equal shape count."""
    folder, data, state, _ = example
    about = json.loads(json.loads(split(data)[0][8:])["__metadata__"]["about"])
    arrays = safetensors.numpy.load(data)
    a, b = (f"blocks.0.conv{i}.conv.bits" for i in (1, 2))
    swapped = arrays | {a: arrays[b], b: arrays[a]}
    path = folder / "other.safetensors"
    for changed in ((about | {"model": about["model"] | {"activation": "gelu"}}, arrays), (about, swapped)):
        path.write_bytes(packed_file.to_bytes(changed[1], changed[0]))
        with pytest.raises(ValueError, match="other.safetensors does not hold the network that was saved"):
            load_packed(path)


def test_integers_of_an_own_network_are_stored_where_they_can_be(tmp_path):
    class Counting(Plain):
        def __init__(self, start=3):
            super().__init__()
            self.register_buffer("count", torch.tensor([start, 2]))

    pack(Counting()).save(tmp_path / "net.safetensors")
    found = load_packed(tmp_path / "net.safetensors", net=Counting(0)).net.count
    assert found.tolist() == [3, 2] and found.dtype == torch.int64
    with pytest.raises(ValueError, match="count holds numbers of type torch.int64 that a packed file"):
        pack(Counting(2**40 + 1)).save(tmp_path / "net.safetensors")


@pytest.mark.parametrize("neuron", [{}, {"neuron": "mem_bn"}], ids=str)
def test_loading_and_the_first_call_do_not_load_the_compiler(neuron, tmp_path):
    """The one of torch, with its algebra: a second in which nothing else happens."""
    pack(empf.resnet18(in_channels=1, image_size=8, width=0.0625, T=2, **neuron).eval()).save(
        tmp_path / "net.safetensors"
    )
    code = f"import sys, torch, empf\nnet = empf.load_packed({str(tmp_path / 'net.safetensors')!r})\n"
    code += "net(torch.randn(1, 1, 8, 8))\nprint([name for name in ('torch._dynamo', 'sympy') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
