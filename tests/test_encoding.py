"""Trees of state go through the encoding and JSON, and come back as they were, bit for bit."""

from __future__ import annotations

import json
import math
import random
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.snapshot.encoding import DecodingError, EncodingError, decode, encode
from orchestrator.snapshot.tensor_file import memory
from states import InterlockError, State, Trigger

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")


def round_trip(tree: Any) -> Any:
    """As through files: JSON text, and tensors that are contiguous and own their memory."""
    encoded = encode(tree)
    document = json.loads(json.dumps(encoded.document, allow_nan=False))
    return decode(document, {name: tensor.contiguous().clone() for name, tensor in encoded.tensors.items()})


def same(one: Any, other: Any) -> bool:
    """Equal in type, order, layout and every bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return same_tensor(one, other)
    if isinstance(one, np.ndarray):
        return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    if isinstance(one, np.generic):  # as arrays: np.str_("") gives four bytes of whatever comes after it
        return one.dtype == other.dtype and np.asarray(one).tobytes() == np.asarray(other).tobytes()
    if isinstance(one, float):
        return struct.pack("d", one) == struct.pack("d", other)
    if isinstance(one, complex):
        return same(one.real, other.real) and same(one.imag, other.imag)
    if isinstance(one, dict):
        factories = getattr(one, "default_factory", None), getattr(other, "default_factory", None)
        return factories[0] is factories[1] and same([*one.items()], [*other.items()])
    if isinstance(one, set | frozenset):
        return len(one) == len(other) and all(any(same(a, b) for b in other) for a in one)
    if isinstance(one, deque) and one.maxlen != other.maxlen:
        return False
    if isinstance(one, list | tuple | deque):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def same_tensor(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.layout, one.dtype, one.shape) != (other.layout, other.dtype, other.shape):
        return False
    if one.layout is torch.sparse_coo:
        parts = zip((one._indices(), one._values()), (other._indices(), other._values()), strict=True)
        return one.is_coalesced() == other.is_coalesced() and all(same_tensor(a, b) for a, b in parts)
    return one.stride() == other.stride() and bits(one) == bits(other)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(memory(tensor.resolve_conj().resolve_neg().contiguous()))


# -- random trees ------------------------------------------------------------------------------------

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64),
    *(
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    ),
    *(torch.bool, torch.complex32, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz),
]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    size = math.prod(shape) * dtype.itemsize
    if dtype is torch.bool:
        tensor = torch.tensor(
            draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype=dtype
        ).reshape(shape)
    else:  # any bits: NaN with payloads, infinities and subnormals among them
        raw = bytearray(random.Random(draw(st.integers(0, 999))).randbytes(size))
        tensor = (torch.frombuffer(raw, dtype=dtype) if size else torch.empty(0, dtype=dtype)).reshape(shape)
    order = draw(st.permutations(range(len(shape))))
    tensor = tensor.permute(order)
    if shape and draw(st.booleans()):
        tensor = tensor[::2]
    return tensor


def arrays() -> st.SearchStrategy[np.ndarray[Any, Any]]:
    dtypes = st.sampled_from(["?", "<i8", ">i4", "<u2", "<f2", "<f8", ">f8", "<c16", "<U3", "S4", "<M8[ns]"])
    plain = st.builds(lambda dtype, shape: np.arange(math.prod(shape)).astype(dtype).reshape(shape),
                      dtypes, st.lists(st.integers(0, 3), max_size=3))  # fmt: skip
    return st.one_of(plain, plain.map(np.asfortranarray), plain.map(lambda a: a[..., ::-1] if a.ndim else a))


def numpy_scalars() -> st.SearchStrategy[np.generic]:
    return st.one_of(
        st.builds(np.float64, st.floats()),
        st.builds(np.float32, st.floats(width=32)),
        st.builds(np.int16, st.integers(-9, 9)),
        st.builds(np.bool_, st.booleans()),
        st.builds(np.str_, st.text(max_size=3)),
        st.just(np.datetime64("2024-01-01", "s")),
    )


hashable_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**200), 2**200),
    st.floats(),
    st.sampled_from([-0.0, 5e-324, struct.unpack("<d", b"\1\0\0\0\0\0\xf8\xff")[0]]),
    st.complex_numbers(),
    st.text(st.characters(), max_size=8),  # lone surrogates too
    st.sampled_from(["$", "a/b", "\ud800\udc00", "__metadata__"]),
    st.binary(max_size=8),
    st.sampled_from([*State, *Trigger]),
    st.sampled_from(
        [torch.float32, torch.device("cuda:1"), torch.device("cpu"), torch.Size([2, 0]), range(3, 9, 2)]
    ),
    numpy_scalars(),
)
keys = st.recursive(
    hashable_scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3).map(tuple), st.frozensets(inner, max_size=3)),
    max_leaves=4,
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    pairs = st.lists(st.tuples(keys, inner), max_size=4)
    return st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.text(max_size=4), inner, max_size=4),
        pairs.map(dict),
        pairs.map(OrderedDict),
        st.builds(defaultdict, st.sampled_from([None, dict, list, int, float]), pairs),
        st.dictionaries(keys, st.integers(), max_size=4).map(Counter),
        st.builds(deque, st.lists(inner, max_size=4), st.sampled_from([None, 0, 2, 9])),
        st.sets(keys, max_size=4),
        st.frozensets(keys, max_size=4),
    )


trees = st.recursive(
    st.one_of(hashable_scalars, tensors(), arrays(), st.binary().map(bytearray)), containers, max_leaves=12
)


@given(trees)
def test_any_tree_comes_back_bit_for_bit(tree: Any) -> None:
    assert same(round_trip(tree), tree)


@given(trees)
def test_encoding_is_deterministic(tree: Any) -> None:
    one, other = encode(tree), encode(tree)
    assert json.dumps(one.document) == json.dumps(other.document)
    assert [*one.tensors] == [*other.tensors]


# -- what plain JSON gets wrong ----------------------------------------------------------------------


def test_states_of_schedulers_and_generators_come_back() -> None:
    tree = {
        "milestones": Counter({3: 1, 7: 2}),
        "python": random.Random(5).getstate(),
        "numpy": np.random.default_rng(3).bit_generator.state,
        "legacy": np.random.RandomState(4).get_state(),
        "best": -math.inf,
        "inf": [math.inf, math.nan, -0.0],
    }
    found = round_trip(tree)
    assert same(found, tree)
    assert list(found["milestones"]) == [3, 7]
    random.Random().setstate(found["python"])


def test_plain_values_are_plain_json() -> None:
    document = encode({"epoch": 3, "lr": 0.1, "names": ["a", None, True]}).document
    assert document == {"epoch": 3, "lr": 0.1, "names": ["a", None, True]}


def test_integers_of_more_digits_than_python_prints() -> None:
    huge = -(7**9000)
    assert round_trip({huge: huge}) == {huge: huge}


def test_strings_that_only_look_like_a_surrogate_pair() -> None:
    assert round_trip(["\ud83d\ude00", "😀"]) == ["\ud83d\ude00", "😀"]


def test_structured_and_wide_arrays() -> None:
    record = np.zeros(3, np.dtype([("a", "<i4"), ("b", ">f8", (2,))]))
    record["b"] = 1.5
    for array in (
        record,
        np.arange(3, dtype=np.longdouble),
        np.array("2020-01-01", "M8[D]"),
        np.array(["", "é"]),
    ):
        assert same(round_trip(array), array)
    assert same(round_trip(record[1]), record[1])
    wide = np.longdouble("0.1")  # has padding, which is not part of its value
    assert type(round_trip(wide)) is np.longdouble
    assert round_trip(wide) == wide


def test_arrays_can_be_written_to() -> None:
    frozen = np.arange(4.0)
    frozen.flags.writeable = False
    for array in round_trip([frozen, frozen.astype(">f8")]):
        array[0] = 7.0
        assert array[0] == 7.0


# -- tensors -----------------------------------------------------------------------------------------


def test_nothing_is_copied() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 4))
    array = np.arange(5.0)
    encoded = encode({"model": {"weight": weight, "t": weight.t(), "row": weight[1]}, "array": array})
    found = encoded.tensors
    assert list(found) == ["model/weight", "model/t", "model/row", "array"]
    assert found["model/weight"].data_ptr() == found["model/t"].data_ptr() == weight.data_ptr()
    assert not found["model/weight"].requires_grad
    array[0] = 9.0
    assert found["array"][0] == 9.0


def test_the_document_shares_nothing_with_the_tree() -> None:
    tree: dict[str, Any] = {"history": [{"loss": 1.0}], "stop": {}}
    document = encode(tree).document
    tree["history"][0]["loss"] = 2.0
    tree["stop"]["now"] = True
    assert document == {"history": [{"loss": 1.0}], "stop": {}}


def test_strides_come_back() -> None:
    image = torch.randn(2, 3, 4, 5)
    for tensor in (
        image.to(memory_format=torch.channels_last),
        image.permute(3, 1, 0, 2),
        image[:, :, ::2],
        torch.empty_strided((3, 1, 2), (2, 77, 1)).fill_(1.0),
        image.to(torch.complex128).to(memory_format=torch.channels_last),
        image.to(torch.float8_e5m2).to(memory_format=torch.channels_last),
    ):
        assert same_tensor(round_trip(tensor), tensor)


def test_an_expanded_tensor_is_stored_once() -> None:
    wide = torch.arange(3.0)[:, None].expand(3, 1000)
    encoded = encode(wide)
    assert encoded.tensors["tensor"].numel() == 3
    found = decode(encoded.document, encoded.tensors)
    assert same_tensor(found, wide)


def test_memory_that_would_be_wasted_or_shared_is_not() -> None:
    column = torch.zeros(5000, 5000)[:, 7]
    found = round_trip({"column": column, "windows": torch.arange(6).unfold(0, 3, 1)})
    assert found["column"].stride() == (1,)
    assert found["windows"].is_contiguous()
    assert found["windows"].tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]


@pytest.mark.parametrize("name", ["bits8", "float8_e8m0fnu", "float4_e2m1fn_x2", "uint4", "int3"])
def test_dtypes_without_arithmetic(name: str) -> None:
    dtype = getattr(torch, name, None)
    if dtype is None:
        pytest.skip(f"this torch has no {name}")
    tensor = torch.arange(12, dtype=torch.uint8).reshape(3, 4).t().view(dtype)
    found = round_trip(tensor)
    assert (found.dtype, found.shape, found.stride()) == (dtype, tensor.shape, tensor.stride())
    assert found.view(torch.uint8).equal(tensor.view(torch.uint8))


def test_pending_conjugation_and_negation() -> None:
    number = torch.tensor([1 + 2j, 3 - 4j])
    tree = [number, number.conj(), number.conj().imag]
    assert same(round_trip(tree), tree)


def test_tied_weights_come_back_as_one_tensor() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 2))
    tree = {"a": weight, "b": weight.detach(), "t": weight.t(), "other": weight.detach().clone()}
    encoded = encode(tree)
    assert list(encoded.tensors) == ["a", "t", "other"]
    found = round_trip(tree)
    assert found["a"] is found["b"]
    assert found["a"] is not found["other"]
    assert found["t"].stride() == (1, 2)


def test_empty_tensors_are_not_taken_for_one_another() -> None:
    found = round_trip([torch.empty(0, 3), torch.empty(0, dtype=torch.int8), torch.empty(0, 3)])
    assert [(t.shape, t.dtype) for t in found] == [
        ((0, 3), torch.float32),
        ((0,), torch.int8),
        ((0, 3), torch.float32),
    ]
    assert found[0] is not found[2]


def test_gradients_of_sparse_embeddings() -> None:
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1, 3, 1])).sum().backward()
    gradient = embedding.weight.grad
    assert gradient is not None
    assert not gradient.is_coalesced()
    found = round_trip({"g": gradient, "same": gradient, "c": gradient.coalesce()})
    assert same_tensor(found["g"], gradient)
    assert found["g"] is found["same"]
    assert found["c"].is_coalesced()
    assert found["c"].to_dense().equal(gradient.to_dense())


def test_names_that_meet_are_told_apart() -> None:
    one, two, three = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)
    tree = {"a": {"b": one}, "a/b": two, "__metadata__": three}
    encoded = encode(tree)
    assert list(encoded.tensors) == ["a/b", "a/b#2", "__metadata__#2"]
    assert same(decode(encoded.document, encoded.tensors), tree)


# -- what is refused ---------------------------------------------------------------------------------


class Pair(NamedTuple):
    one: int


class Word(str):
    __slots__ = ()


def refused(tree: Any) -> EncodingError:
    with pytest.raises(EncodingError) as caught:
        encode(tree)
    assert isinstance(caught.value, InterlockError)
    return caught.value


def knot() -> list[Any]:
    inner: list[Any] = []
    inner.append({"again": inner})
    return inner


def tower() -> list[Any]:
    top: list[Any] = []
    for _ in range(200):
        top = [top]
    return top


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("make", "path", "found"),
    [
        (lambda: {"callbacks": {"ema": {"fn": knot}}}, "callbacks/ema/fn", "a function"),
        (lambda: {"a": [1, object()]}, "a/1", "an object"),
        (lambda: {"a": Pair(1)}, "a", "test_encoding.Pair"),
        (lambda: {"a": Word("x")}, "a", "test_encoding.Word"),
        (lambda: {1: {(2, 3): lambda: 0}}, "1/(2, 3)", "a function"),
        (lambda: [knot()], "0/0/again", "contains itself"),
        (tower, "0" + "/0" * 99, "inside 100 others"),
        (lambda: defaultdict(lambda: 1), "", "factory is a function"),
        (lambda: {"a": torch.Generator()}, "a", "torch._C.Generator"),
        (lambda: {"a": np.random.default_rng()}, "a", "Generator"),
        (lambda: {"a": np.array([object()])}, "a", "array of Python objects"),
        (lambda: {"a": np.ma.masked_array([1.0])}, "a", "MaskedArray"),
        (lambda: {"a": torch.empty(2, device="meta")}, "a", "meta tensor"),
        (lambda: {"a": torch.zeros(2, 2).to_sparse_csr()}, "a", "layout torch.sparse_csr"),
        (lambda: {"a": torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)}, "a", "quantized"),
        (lambda: {"a": torch.nn.parameter.UninitializedParameter()}, "a", "UninitializedParameter"),
        (lambda: {torch.zeros(1): 1}, "tensor([0.])", "as a key"),
        (lambda: {"a": torch.nn.Linear(1, 1)}, "a", "torch.nn.modules.linear.Linear"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(make: Callable[[], Any], path: str, found: str) -> None:
    error = refused(make())
    assert error.path == path
    assert found in str(error)
    assert "expected" in str(error)


def test_a_list_met_twice_is_no_knot() -> None:
    shared = [1]
    assert round_trip([shared, shared]) == [[1], [1]]


@pytest.mark.parametrize(
    "document",
    [
        {"$": "pickle", "v": "gASVAAAA"},
        {"$": ["list"]},
        {"$": "State", "v": "NOWHERE"},
        {"$": "dtype", "v": "load"},
        {"$": "tensor", "name": "gone"},
        {"$": "tensor"},
        {"$": "tensor", "name": "there", "stride": [1, 1, 1]},
        {"$": "tensor", "name": "there", "dtype": "float3"},
        {"$": "bytes", "v": 3},
        {"$": "defaultdict", "factory": "exec", "v": []},
        {"$": "dict", "v": [[[], 1]]},
    ],
)
def test_documents_of_another_hand_are_refused(document: Any) -> None:
    with pytest.raises(DecodingError, match="found"):
        decode([document], {"there": torch.zeros(2)})
