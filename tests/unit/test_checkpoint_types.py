"""What a training loop keeps comes back as what it was, or is refused by name; a load that fails changes nothing."""

from __future__ import annotations

import copy
import enum
import math
import random
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_optimizer import SOAP
from torch import nn
from torch.optim import lr_scheduler

import hpc_kfac as hk
from hpc_kfac import checkpoint, cli
from hpc_kfac.checkpoint.image import build, parse, tensor_bytes
from hpc_kfac.checkpoint.staging import Staging
from hpc_kfac.checkpoint.values import KIND, as_tree, from_tree

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf", "ignore:.*lr_scheduler.step", "ignore:.*epoch parameter")


def same(left: Any, right: Any) -> bool:
    """Equal in type, order and every bit."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        factories = [getattr(value, "default_factory", None) for value in (left, right)]
        pairs = list(left.items()), list(right.items())
        return factories[0] is factories[1] and same(*pairs)
    if isinstance(left, list | tuple | deque):
        limits = [getattr(value, "maxlen", None) for value in (left, right)]
        return limits[0] == limits[1] and len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, set | frozenset):
        return len(left) == len(right) and all(any(same(a, b) for b in right) for a in left)
    if isinstance(left, torch.Tensor):
        described = [(t.dtype, t.shape, tensor_bytes(t.resolve_conj().contiguous()).tobytes()) for t in (left, right)]
        return described[0] == described[1]
    if isinstance(left, np.ndarray | np.generic):
        return (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes())
    if isinstance(left, complex):
        return same(left.real, right.real) and same(left.imag, right.imag)
    if isinstance(left, float):
        return left != left and right != right or (left == right and math.copysign(1, left) == math.copysign(1, right))
    return left == right


def through_a_file(value: Any) -> Any:
    image = build(Staging().copy({"extra": as_tree(value, "extra")}), "common", 1)
    return from_tree(parse(b"".join(image.segments()))["extra"])


DTYPES = ["f2", ">f4", "<f8", "i1", ">i8", "u2", "u4", "u8", "?", "c8", ">c16"]
TEXT = st.text(max_size=5) | st.sampled_from([KIND, "order", "list of", "keys", "a/b", "a\0", "\ud800", "\ud83d\ude00"])
SINGLE = (
    st.none() | st.booleans() | st.integers() | st.integers(-(2**80), 2**80) | st.floats() | st.complex_numbers() | TEXT
    | st.binary(max_size=5) | st.sampled_from([torch.bfloat16, torch.device("cpu"), torch.device("cuda:1")])
)  # fmt: skip
NUMPY = st.builds(
    lambda dtype, shape, bits: np.frombuffer(bits, "u1")[: math.prod(shape)].astype(dtype).reshape(shape),
    st.sampled_from(DTYPES), st.sampled_from([(), (0, 3), (2, 2), (3,)]), st.binary(min_size=16, max_size=16),
)  # fmt: skip
KEYS = st.recursive(SINGLE, lambda keys: st.tuples(keys, keys) | st.tuples(), max_leaves=3)
LEAVES = SINGLE | NUMPY | NUMPY.filter(lambda array: array.size).map(lambda array: array.flat[0]) | st.sampled_from(
    [torch.tensor(2.5), torch.zeros(0, 3), torch.arange(6).view(2, 3).T, torch.ones(2, dtype=torch.bfloat16),
     torch.tensor([True]), torch.Size([2, 3]), torch.Size([]), bytearray(b"ab"), np.str_("ab"), np.array(["a", "bcd"])]
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda values: (
        st.lists(values, max_size=3)
        | st.lists(values, max_size=3).map(tuple)
        | st.builds(deque, st.lists(values, max_size=3), st.sampled_from([None, 3, 7]))
        | st.sets(KEYS, max_size=3)
        | st.frozensets(KEYS, max_size=3)
        | st.dictionaries(TEXT, values, max_size=4)
        | st.dictionaries(KEYS, values, max_size=4)
        | st.dictionaries(KEYS, values, max_size=3).map(OrderedDict)
        | st.dictionaries(TEXT, st.integers(), max_size=3).map(Counter)
        | st.dictionaries(KEYS, values, max_size=3).map(lambda entries: defaultdict(list, entries))
    ),
    max_leaves=8,
)


@given(VALUES)
@settings(max_examples=200, deadline=None)
def test_every_value_comes_back_as_it_was(value: Any) -> None:
    assert same(through_a_file(value), value)


def test_more_than_fits_a_group() -> None:
    """Thousands of attributes of one group take libhdf5 minutes."""
    value = {
        10**5000: {-(10**5000)},
        "many": {f"sample {i}": i * 0.5 for i in range(20_000)},
        "long": {"k" * 70_000: 1, "text": "ä\0" * 40_000},
        "mixed": [1, 2.0, "a", True] * 10_000,
        "history": [{"step": i, "loss": (i, None)} for i in range(300)],
    }
    assert same(through_a_file(value), value)


def test_the_memory_order_of_tensors_is_kept() -> None:
    """A product with a transposed matrix has other last bits."""
    image = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    values = [torch.rand(4, 3).T, image, torch.rand(3, 4)[:, ::2]]
    found = through_a_file(values)
    assert [tensor.stride() for tensor in found[:2]] == [tensor.stride() for tensor in values[:2]]
    assert all(map(torch.equal, found, values))


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


@dataclass
class Settings:
    rate: float = 0.1


class Own(dict):  # type: ignore[type-arg]
    pass


Pair = namedtuple("Pair", "a b")
DEEP: list[Any] = []
DEEP.append(DEEP)
REFUSED = {
    "enum": (Colour.RED, r"extra\['a'\]\[1\] is <Colour.RED: 1> of type .*Colour, which .*; save its .value"),
    "whole enum": (Level.LOW, "IntEnum|Level, which a checkpoint cannot hold; save its .value"),
    "dataclass": (Settings(), r"Settings\(rate=0.1\) of type .*Settings, .* save dataclasses.asdict"),
    "named tuple": (Pair(1, 2), r"Pair\(a=1, b=2\) .* save its _asdict\(\) or tuple"),
    "return type": (torch.ones(2).max(0), r"torch.return_types.max, .* save tuple\(...\) of it"),
    "own dictionary": (Own(a=1), r"Own, .* save dict\(...\) of it"),
    "path": (Path("a"), r"Path, .* save str\(...\) of it"),
    "module": (nn.Linear(1, 1), r"torch.nn.modules.linear.Linear, .* save its state_dict\(\)"),
    "function": (len, "<built-in function len> .* save what it is made from"),
    "class": (int, "<class 'int'> of type type"),
    "generator": (torch.Generator(), r"save its get_state\(\)"),
    "numpy's generator": (np.random.default_rng(0), r"save its bit_generator.state"),
    "objects": (np.array([None]), "numpy's dtype object, .* save arrays or lists of numbers or text"),
    "dates": (np.datetime64("2020-01-01"), r"numpy's dtype datetime64\[D\], .* save its astype\('int64'\)"),
    "records": (np.zeros(1, [("a", "i4")]), "save arrays or lists of numbers"),
    "wide": (np.longdouble(1), "numpy's dtype (float128|longdouble)"),
    "masked": (np.ma.masked_array([1.0], [True]), r"save np.array\(..., subok=False\)"),
    "zeros at the end": (np.str_("a\0"), r"save str\(...\) of it"),
    "sparse": (torch.eye(2).to_sparse(), r"a tensor that has the layout torch.sparse_coo, .*save its to_dense\(\)"),
    "meta": (torch.ones(1, device="meta"), "has no values"),
    "tensor as a key": ({torch.ones(1): 2}, r"extra\['a'\]\[1\] has a tensor as a key"),
    "tensors in a set": ({torch.ones(1)}, "is a set with a tensor"),
    "odd key": ({(1, Colour.RED): 2}, r"the key \(1, <Colour.RED: 1>\) of extra\['a'\]\[1\]"),
    "odd default": (defaultdict(lambda: 1), "a defaultdict that makes its values with <function"),
    "in itself": (DEEP, r"nested deeper than a checkpoint can hold, or in itself"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_held_is_refused_with_its_path_and_a_mend(tmp_path: Path, case: str) -> None:
    value, message = REFUSED[case]
    with pytest.raises(TypeError, match=message):
        checkpoint.save(tmp_path, 1, model=nn.Linear(1, 1), extra={"a": [0, value]})
    assert list(tmp_path.iterdir()) == []


def test_a_file_made_by_hand_runs_nothing() -> None:
    for tree in (
        {KIND: "os.system", "value": "true"}, {KIND: "torch.dtype", "value": "load"}, {KIND: "list"}, {KIND: 1},
        {KIND: "set", "entries": {"0": {}}}, {KIND: "numpy array", "dtype": "O", "values": torch.ones(1)},
        {KIND: "numpy array", "dtype": "<U9", "values": torch.ones(1)}, {KIND: "dict", "keys": [1], "values": []},
        {KIND: "int", "value": "open"}, {KIND: "deque", "entries": [], "maxlen": -1}, {"list of": "a"},
        {KIND: "tensor", "axes": [0], "values": torch.ones(1, 1)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="a value|numpy|invalid|maxlen|zip"):
            from_tree(tree)


LEFT = {"a": {0: (1, 2), "b": np.ones(2)}, "n": [float("nan"), 1], "e": {}, "c": Counter({4: 1}), "s": "\ud800"}
RIGHT = {"a": {0: (1, 3), "b": np.zeros(2)}, "n": [float("nan"), True], "c": Counter({4: 1}), "s": "\ud801"}


def test_the_command_line_looks_into_typed_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Linear(1, 1)
    left, again, right = (
        checkpoint.save(tmp_path / str(i), 1, model=model, extra=extra) for i, extra in enumerate((LEFT, LEFT, RIGHT))
    )
    for words in (["show", left], ["verify", left], ["export", left, tmp_path / "out.pt"], ["list", left]):
        assert cli.main(["checkpoint", *map(str, words)]) in (0, None)
    capsys.readouterr()
    assert cli.main(["checkpoint", "diff", str(left), str(again)]) in (0, None)
    assert "no difference" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):
        cli.main(["checkpoint", "diff", str(left), str(right)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[1].strip().split(" ")[0] for line in lines] == [
        "extra/a/values/0/entries", "extra/a/values/1/values", "extra/e", "extra/n", "extra/order",
        "extra/s/values",
    ]  # fmt: skip


# Schedules and the like


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [4, 8, 8], 0.1),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 4, 0.1),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda s: 1 / (1 + s)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda s: 0.9),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.1, 5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 10),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=20),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.MultiStepLR(o, [2, 5], 0.1)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.MultiStepLR(o, [5], 0.1)]
    ),
}


def rates(optimizer: torch.optim.Optimizer, schedule: Any, steps: int) -> list[tuple[float, float]]:
    found = []
    for _ in range(steps):
        optimizer.step()
        schedule.step(1.0) if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else schedule.step()
        found += [(float(group["lr"]), group["momentum"]) for group in optimizer.param_groups]
    return found


@pytest.mark.parametrize("tensor_rate", [False, True], ids=["", "tensor"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_go_on(tmp_path: Path, name: str, tensor_rate: bool) -> None:
    if tensor_rate and name in ("CyclicLR", "OneCycleLR", "SWALR"):
        pytest.skip("of plain rates")

    def setup() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = nn.Linear(3, 2)
        groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": torch.tensor(0.3) if tensor_rate else 0.3}]
        optimizer = torch.optim.SGD(groups, lr=torch.tensor(0.1) if tensor_rate else 0.1, momentum=0.9)
        return model, optimizer, SCHEDULES[name](optimizer)

    model, optimizer, schedule = setup()
    rates(optimizer, schedule, 3)
    state = schedule.state_dict()
    checkpoint.save(tmp_path, 3, model=model, optimizer=optimizer, extra={"schedule": state})
    expected = copy.deepcopy(state)
    whole = rates(optimizer, schedule, 10)
    model, optimizer, schedule = setup()
    _, extra = checkpoint.load(tmp_path, model=model, optimizer=optimizer)
    assert same(extra["schedule"], expected)
    schedule.load_state_dict(extra["schedule"])
    assert all(isinstance(group["lr"], torch.Tensor) == tensor_rate for group in optimizer.param_groups)
    assert rates(optimizer, schedule, 10) == whole


def test_what_training_loops_keep(tmp_path: Path) -> None:
    class Bend:
        def __init__(self) -> None:
            self.rate = {0: 1.0, (1, 2): 0.5}

        def __call__(self, step: int) -> float:
            return 1.0

    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    extra = {
        "lambda": lr_scheduler.LambdaLR(optimizer, [Bend()]).state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "average": average.state_dict(),
        "seen": {0: 5, 7: {"a": (1, 2)}},
        "numpy": np.random.get_state(),  # noqa: NPY002
        "generator": np.random.default_rng(0).bit_generator.state,
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "scores": np.array([0.5, np.nan], np.float32),
        "best": np.float64(0.5),
        "order": np.random.default_rng(0).permutation(7),
    }
    checkpoint.save(tmp_path, 1, model=model, extra=extra)
    _, found = checkpoint.load(tmp_path, model=model)
    expected = {**extra, "average": OrderedDict(extra["average"])}
    assert same(found, expected)
    random.setstate(found["python"])
    np.random.set_state(found["numpy"])  # noqa: NPY002
    np.random.default_rng().bit_generator.state = found["generator"]


class WithMore(nn.Linear):
    """Keeps more than tensors in its state dict."""

    more: Any = None

    def get_extra_state(self) -> Any:
        return self.more

    def set_extra_state(self, state: Any) -> None:
        self.more = state


class OwnDamping(hk.Damping):
    """Remembers by numbers."""

    def __init__(self, value: float) -> None:
        super().__init__(value)
        self.seen: dict[Any, Any] = {}

    def state_dict(self) -> dict[Any, Any]:
        return {"seen": self.seen, **super().state_dict(), 7: np.float32(0.5)}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.seen = state["seen"]


def test_what_a_model_and_a_damping_keep_beside_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def setup() -> tuple[nn.Module, hk.Preconditioner]:
        model = nn.Sequential(WithMore(2, 2), nn.Linear(2, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, hk.Preconditioner(model, optimizer, method=hk.KFAC(damping=OwnDamping(0.25)))

    model, preconditioner = setup()
    model[0].more = {0: (1, torch.ones(2)), "scales": deque([1.0], 3)}
    preconditioner.damping.seen = {1: (2, None)}  # type: ignore[attr-defined]
    checkpoint.save(tmp_path, 1, model=model, preconditioner=preconditioner)
    other, after = setup()
    other[0].more = 3
    checkpoint.load(tmp_path, model=other, preconditioner=after)
    assert same(other[0].more, model[0].more)
    assert same(after.damping.state_dict(), preconditioner.damping.state_dict())
    for words in (["show"], ["export", tmp_path / "out.pt"]):
        assert cli.main(["checkpoint", words[0], str(tmp_path), *map(str, words[1:])]) in (0, None)
    assert "damping: " in capsys.readouterr().out
    assert set(torch.load(tmp_path / "out.pt")) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    model[0].more = Colour.RED
    with pytest.raises(TypeError, match="0._extra_state in the model's state is <Colour.RED: 1> .* save its .value"):
        checkpoint.save(tmp_path, 2, model=model)
    preconditioner.remove()
    after.remove()


# Optimizers


class Peculiar(torch.optim.SGD):
    """Keeps what torch's load does not take, and state of no parameter."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, lr=lr, momentum=0.9)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {
                "word": "text", "raw": b"ab", "array": np.arange(3.0), "window": deque([torch.ones(2)], 4),
                "wide": torch.full((2,), 1 + 2.0**-40, dtype=torch.float64), "count": torch.tensor(2**40),
                3: {(1, "a"): torch.tensor([True])}, "none": None, "names": ["a"], "list": [torch.ones(1).double()],
            }  # fmt: skip
        self.state["global"] = {"k": 3, 5: torch.ones(2)}  # type: ignore[index]


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    for _ in range(count):
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)  # type: ignore[arg-type]
        else:
            closure()
            optimizer.step()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    name: getattr(torch.optim, name)
    for name in dir(torch.optim)
    if isinstance(getattr(torch.optim, name), type) and name not in ("Optimizer", "SparseAdam")
}
OPTIMIZERS |= {
    "SOAP": SOAP,
    "peculiar": Peculiar,
    "named": lambda p: torch.optim.AdamW(zip(["a", "b"], p, strict=True), lr=torch.tensor(0.01), fused=True),
    "capturable": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), betas=(0.8, 0.99), foreach=False, amsgrad=True),
    "noted": lambda p: torch.optim.SGD([{"params": list(p), "tags": ("a", None, {1: 2}), 7: [0.5]}], momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_go_on_with_the_same_bits_and_types(tmp_path: Path, name: str) -> None:
    def setup() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False))
        return model, OPTIMIZERS[name](list(model.parameters()))

    model, optimizer = setup()
    steps(model, optimizer, 3)
    checkpoint.save(tmp_path, 3, model=model, optimizer=optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    steps(model, optimizer, 3)
    again, other = setup()
    checkpoint.load(tmp_path, model=again, optimizer=other)
    after = other.state_dict()
    assert set(after) == set(before) and set(after["state"]) == set(before["state"])
    for key, entries in before["state"].items():
        assert set(after["state"][key]) == set(entries)
        assert all(same(after["state"][key][entry], value) for entry, value in entries.items()), after["state"][key]
    for old, new in zip(before["param_groups"], after["param_groups"], strict=True):
        assert set(old) == set(new) and all(same(new[key], value) for key, value in old.items())
    steps(again, other, 3)
    assert all(map(torch.equal, again.parameters(), model.parameters()))


def test_an_optimizer_of_another_form_is_refused(tmp_path: Path) -> None:
    class Wrapper(torch.optim.SGD):
        def state_dict(self) -> dict[str, Any]:
            return {"inner": super().state_dict()}

    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="optimizer Wrapper is not made as torch's are; save it apart: extra="):
        checkpoint.save(tmp_path, 1, model=model, optimizer=Wrapper(model.parameters(), lr=0.1))
    odd = torch.optim.SGD([{"params": list(model.parameters()), "rule": Colour.RED}], lr=0.1)
    with pytest.raises(TypeError, match=r"optimizer.param_groups\[0\]\['rule'\] is <Colour.RED: 1>"):
        checkpoint.save(tmp_path, 1, model=model, optimizer=odd)
