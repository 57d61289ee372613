"""What kinds of values arguments may have: flags, numbers, names. What is refused is refused in words."""

from __future__ import annotations

import enum
import fractions
import math
from decimal import Decimal

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cute_attn import arguments, attention
from tests.host.test_errors import Row, assert_raises, rules, table
from tests.support import make_qkv


class Name(enum.StrEnum):
    REFERENCE = "reference"


class FiveByIndex:
    def __repr__(self):
        return "FiveByIndex()"

    def __index__(self):
        return 5


def inputs(batch=2, heads=4, heads_kv=2, dtype=torch.float32, sq=33, sk=40):
    return make_qkv(batch, sq, sk, heads, heads_kv, 16, 24, dtype)


q, k, v = inputs()


def call(**options):
    return lambda: attention(q, k, v, **options)


# ---- flags and numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("true", [True, np.True_, np.array(True), torch.tensor(True)], ids=repr)
def test_flags(true):
    assert rules(causal=true)().right == 0
    assert rules(causal=~true if true is not True else False)().right is None
    _, lse = attention(q, k, v, return_lse=true, deterministic=true)
    assert lse.shape == (2, 4, 33)


@pytest.mark.parametrize(
    "number",
    [0.5, np.float16(0.5), np.float32(0.5), np.float64(0.5), np.array(0.5), fractions.Fraction(1, 2)]
    + [torch.tensor(0.5, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)],
    ids=repr,
)
def test_real_numbers(number):
    found = rules(scale=number, softcap=number)()
    assert (found.scale, found.softcap) == (0.5, 0.5)
    assert type(found.scale) is type(found.softcap) is float


@pytest.mark.parametrize(
    "five",
    [5, np.int64(5), np.uint8(5), np.array(5), FiveByIndex(), torch.tensor(5), torch.tensor(5, dtype=torch.uint8)],
    ids=repr,
)
def test_integers(five):
    found = rules(window=(five, five), scale=five, softcap=five)()
    assert (found.left, found.right, found.scale, found.softcap) == (5, 5, 5.0, 5.0)
    assert type(found.left) is type(found.right) is int


def test_numbers_at_the_edges():
    assert rules(window=(10**9999, np.int64(-1)))().left == 16  # the sum of the lengths: no query sees farther
    assert rules(scale=0)().scale == 0.0
    assert rules(scale=torch.tensor(0.0), softcap=None)().softcap == 0.0
    for cap in (0, 0.0, -0.0, False * 1.0, np.float32(0), None):
        assert rules(softcap=cap)().softcap == 0.0
    tiny, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    log2_e = math.log2(math.e)
    for scale in (tiny / log2_e * 1.0001, largest / log2_e * 0.9999):
        assert rules(scale=scale)().scale == scale
        assert rules(scale=-scale)().scale == -scale
        with pytest.raises(ValueError, match="in float32"):
            rules(scale=scale * (0.999 if scale < 1 else 1.001))()


@pytest.mark.parametrize("name", [Name.REFERENCE, np.str_("reference")])
def test_names_of_other_kinds_of_strings(name):
    assert torch.equal(attention(q, k, v, backend=name), attention(q, k, v))
    plain = arguments.name_of("backend", name, "")
    assert (type(plain), plain) == (str, "reference")


def nested():
    return torch.nested.nested_tensor([torch.ones(2)])


def fake(*shape, device="cpu", dtype=torch.float32):
    with FakeTensorMode():
        return torch.empty(shape, device=device, dtype=dtype)


KINDS = [
    *(
        Row(f"{flag} = {got}", call(**{flag: value}), TypeError, f"{flag} is {got}", "True or False is needed")
        for flag in ("causal", "return_lse", "deterministic")
        for value, got in (
            ("false", "a str, 'false'"),
            ("", "a str, ''"),
            ([], "a list, []"),
            (1, "1"),
            (0, "0"),
            (None, "None"),
            (1.0, "1.0"),
            (np.int64(1), "an int64, np.int64(1)"),
            (torch.tensor(1), "a Tensor of shape () and dtype torch.int64"),
            (torch.ones(3, dtype=torch.bool), "a Tensor of shape (3,) and dtype torch.bool"),
            (np.ones(3, dtype=bool), "a ndarray of shape (3,) and dtype bool"),
        )
    ),
    *(
        Row(
            f"a mask of {type(mask).__name__}",
            call(causal=mask),
            TypeError,
            "of shape (33, 40)",
            "try mask=",
            "attn_mask",
        )
        for mask in (torch.ones(33, 40, dtype=torch.bool), torch.zeros(33, 40), np.ones((33, 40), dtype=bool))
    ),
    Row(
        "a flag on a GPU",
        call(causal=fake(device="cuda", dtype=torch.bool)),
        TypeError,
        "on cuda:0",
        "synchronisation",
        ".item()",
    ),
    *(
        Row(f"{name} = {got}", rules(**{name: value}), error, f"{name} is {got}", "a finite number is needed", try_)
        for name, try_ in (("scale", "or None for 1/√head_dim"), ("softcap", "or 0 for none"))
        for value, error, got in (
            ("0.1", TypeError, "a str, '0.1'"),
            ("", TypeError, "a str, ''"),
            ([], TypeError, "a list, []"),
            (True, TypeError, "True"),
            (False, TypeError, "False"),
            (np.True_, TypeError, "a bool, np.True_"),
            (1j, TypeError, "a complex, 1j"),
            (Decimal(1), TypeError, "a Decimal, Decimal('1')"),
            (torch.tensor(True), TypeError, "a Tensor of shape () and dtype torch.bool"),
            (torch.tensor(1j), TypeError, "a Tensor of shape () and dtype torch.complex64"),
            (torch.ones(1), TypeError, "a Tensor of shape (1,) and dtype torch.float32"),
            (torch.ones(3), TypeError, "a Tensor of shape (3,) and dtype torch.float32"),
            (np.ones(3), TypeError, "a ndarray of shape (3,) and dtype float64"),
            (
                torch.tensor(0.1, requires_grad=True),
                TypeError,
                "a Tensor of shape () and dtype torch.float32 that requires a gradient",
            ),
            (torch.tensor(0.1, device="meta"), TypeError, "a Tensor of shape () and dtype torch.float32 on meta"),
            (fake(), TypeError, "a FakeTensor of shape () and dtype torch.float32 whose value can't be read"),
            (
                fake(device="cuda"),
                TypeError,
                "a FakeTensor of shape () and dtype torch.float32 on cuda:0, and reading it would wait",
            ),
            (math.nan, ValueError, "nan"),
            (-math.inf, ValueError, "-inf"),
            (torch.tensor(math.inf), ValueError, "a Tensor of shape ()"),
            (10**400, ValueError, "an int of about 401 digits"),
            (-(10**9999), ValueError, "an int of about 10000 digits"),
            (fractions.Fraction(10**9999), ValueError, "a Fraction"),
        )
    ),
    *(
        Row(
            f"window of {got}",
            rules(window=(None, value)),
            TypeError,
            f"right side is {got}",
            "an int is needed",
            "or None",
        )
        for value, got in (
            (5.0, "5.0"),
            ("5", "a str, '5'"),
            (True, "True"),
            (np.True_, "a bool, np.True_"),
            (np.float64(5), "np.float64(5.0)"),
            (torch.tensor(5.0), "a Tensor of shape () and dtype torch.float32"),
            (torch.tensor(True), "a Tensor of shape () and dtype torch.bool"),
            (torch.ones(2, dtype=torch.int64), "a Tensor of shape (2,)"),
            (fake(device="cuda", dtype=torch.int64), "a FakeTensor of shape () and dtype torch.int64 on cuda:0"),
        )
    ),
    Row(
        "nested",
        lambda: attention(q, k, v, scale=nested()),
        TypeError,
        "a Tensor of several shapes",
        "finite number",
        "or None",
    ),
    Row("window of lists", rules(window=[[10**9999], 2]), TypeError, "left side is a list", "an int is needed", "None"),
    Row("backend a number", call(backend=1), TypeError, "backend is 1", "'auto', 'cute', 'reference'"),
    Row("no such backend", call(backend="triton"), ValueError, "backend is 'triton'", "'auto', 'cute', 'reference'"),
    Row("a device", lambda: arguments.device_of("gpu"), ValueError, "device is a str, 'gpu'", "its name is needed", "'cuda'"),
    Row("a device's kind", lambda: arguments.device_of(0.5), TypeError, "device is 0.5", "a torch.device or", "'cuda'"),
]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
@table(KINDS)
def test_kinds(row):
    assert_raises(row)
