"""Gradients of captured tensors and of biases, and dropout, in the reference and where all of it is decided on the host."""

import math

import pytest
import torch

from cute_attn import attention, attention_varlen, dropout
from cute_attn.expressions import traced
from tests.captured import CASES, check, seeded
from tests.support import make_gradients, make_qkv

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("p", "kind"), [(0.0, "gaussian"), (0.0, "peaky"), (0.25, "gaussian")])
def test_reference(case, p, kind):
    check(case, (2, 130, 150), (4, 2), (16, 24), torch.bfloat16, "cpu", kind, p=p, backend="reference")
