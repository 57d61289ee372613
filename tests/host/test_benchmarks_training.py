"""The training example: that attention is told apart from something else, and that what follows is said to follow."""

from dataclasses import replace

import pytest
import torch

from benchmarks import documents, training, transformer
from benchmarks.__main__ import main
from benchmarks.training import Outcome
from tests import support

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = replace(transformer.SIZES["cpu"], steps=6)


def outcome(**curves):
    curves = {"eager": [3.0, 2.0, 1.0], "other": [3.0, 2.1, 1.0], **curves}
    return Outcome({"card": {}}, curves, dict.fromkeys(curves, 1.0))


# --- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [None, 3])
def test_every_attention_is_the_same_function(order):
    q, k, v = support.make_qkv(2, 50, 50, 4, 2, 64, dtype=torch.float64)
    exact, _ = support.oracle(q, k, v, causal=True)
    for attend in (transformer.eager(order), transformer.torch_fused(), transformer.cute_attn()):
        torch.testing.assert_close(attend(q, k, v), exact)


def test_other_orders_of_the_keys_add_up_to_other_roundings():
    q, k, v = support.make_qkv(1, 200, 200, 2, 1, 64, dtype=torch.bfloat16)
    plain, other, third = (transformer.eager(order)(q, k, v) for order in (None, 1, 2))
    assert not torch.equal(plain, other)
    assert not torch.equal(other, third)


def test_batches_are_stretches_of_the_text_and_the_same_for_a_seed():
    text = bytes(range(256)) * 4
    first, again, other = (list(transformer.batches(text, SIZE, "cpu", seed)) for seed in (0, 0, 1))
    assert len(first) == SIZE.steps
    assert first[0].shape == (SIZE.batch, SIZE.seqlen + 1)
    assert torch.equal((first[0][:, 1:] - first[0][:, :-1]) % 256, torch.ones(SIZE.batch, SIZE.seqlen).long())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    with pytest.raises(ValueError, match="more than 161 are needed"):
        next(transformer.batches(b"short", SIZE, "cpu", 0))


def test_a_model_learns_and_repeats_itself():
    text = training.own_text()
    first, again = (transformer.train(transformer.eager(), SIZE, text, "cpu", 0) for _ in range(2))
    assert first == again
    assert first[-1] < first[0]


# --- the verdict -----------------------------------------------------------------------------------------------------


def test_the_bound_is_measured():
    found = outcome(cute_attn=[3.0, 2.0, 1.2])
    assert found.differences == {"other": pytest.approx(0.1), "cute_attn": pytest.approx(0.2)}
    assert found.bound == pytest.approx(0.2)
    assert outcome(cute_attn=[3.0, 2.0, 1.15]).follows
    assert not outcome(cute_attn=[3.0, 2.0, 1.25]).follows
    assert not outcome(cute_attn=[3.0, float("nan"), 1.0]).follows


def test_an_outcome_survives_its_file_and_gets_into_a_document(tmp_path):
    found = outcome(cute_attn=[3.0, 2.0, 1.15])
    found.save(tmp_path / "t.json")
    assert Outcome.load(tmp_path / "t.json") == found
    text = documents.trained(found)
    assert "| cute_attn | 1.1500 | 0.1500 | 1.0 |" in text
    assert "Over 3 steps the loss curve with cute_attn follows eager attention's" in text
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ValueError, match="train again"):
        Outcome.load(tmp_path / "t.json")


@pytest.fixture
def in_float64(monkeypatch):
    """Attentions take float64 between the model's own dtype: what they differ by in rounding is then rounded away, and the
    verdict is a fact about the functions, on any processor."""
    for name in ("cute_attn", "eager", "torch_fused"):
        made = getattr(transformer, name)
        monkeypatch.setattr(transformer, name, lambda *a, made=made, **how: rounded_once(made(*a, **how)))


def rounded_once(attend):
    return lambda q, k, v: attend(q.double(), k.double(), v.double()).to(q.dtype)


def test_the_command(tmp_path, capsys):
    """As users run it. How far the curves part here is rounding, so that either verdict is right: the status is the one
    that was printed."""
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    paths = ["--json", str(tmp_path / "t.json"), "--plot", str(tmp_path / "plots" / "training")]
    status = main(["training", "--steps", "8", *paths])
    found = Outcome.load(tmp_path / "t.json")
    assert status == (0 if found.follows else 1)
    assert {len(curve) for curve in found.curves.values()} == {8}
    assert found.about["text"]["bytes"] > 10_000
    assert found.sentence in " ".join(capsys.readouterr().out.split())
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"training.svg", "training.png"}
    assert ">cute_attn</text>" in (tmp_path / "plots" / "training.svg").read_text()


def test_attention_does_not_part_from_itself(in_float64, tmp_path, capsys):
    """Forward and backward, to the last bit, where nothing but rounding could tell the attentions apart."""
    assert main(["training", "--json", str(tmp_path / "t.json")]) == 0
    found = Outcome.load(tmp_path / "t.json")
    assert len(found.curves) == 5
    assert all(curve == found.curves["eager"] for curve in found.curves.values())
    assert "follows eager attention's" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("last", "status"), [(1.15, 0), (1.25, 1), (float("nan"), 1)])
def test_the_verdict_is_the_status(monkeypatch, capsys, last, status):
    """Two of the other curves end 0 from eager attention's, one 0.1: 0.2 is allowed."""
    ends = iter([last, 1.0, 1.1, 1.0, 1.0])  # ours comes first, then eager attention
    monkeypatch.setattr(transformer, "train", lambda *_: [3.0, 2.0, next(ends)])
    assert main(["training"]) == status
    assert next(ends, None) is None
    assert ("follows eager" if status == 0 else "parts from eager") in " ".join(capsys.readouterr().out.split())


class Partial(torch.autograd.Function):
    """The identity, which loses the gradient of the first ``lost`` rows."""

    @staticmethod
    def forward(ctx, x, lost):
        ctx.lost = lost
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        dx = dx.clone()
        dx[:, : ctx.lost] = 0
        return dx, None


def one_key_too_many(q, k, v):
    """Attention in which a query also sees the key after its own, which is what it is to foretell."""
    q, k, v = q.transpose(1, 2), *(x.repeat_interleave(q.shape[2] // x.shape[2], 2).transpose(1, 2) for x in (k, v))
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(diagonal=1)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, visible).transpose(1, 2)


FAULTS = {
    "no gradient of q": lambda q, k, v: transformer.eager()(Partial.apply(q, SIZE.seqlen), k, v),
    "no gradient of the first keys": lambda q, k, v: transformer.eager()(q, Partial.apply(k, 64), v),
    "no gradient of the first values": lambda q, k, v: transformer.eager()(q, k, Partial.apply(v, 64)),
    "one key too many": one_key_too_many,
}


@pytest.fixture
def same_text(monkeypatch):
    """A text that stays: a dozen steps are few, and each edit of a document would be another draw."""
    licence = (training.ROOT / "LICENSE").read_bytes()
    monkeypatch.setattr(training, "own_text", lambda: licence)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_attention_parts_from_it(in_float64, same_text, monkeypatch, fault):
    monkeypatch.setattr(transformer, "cute_attn", lambda **_: rounded_once(FAULTS[fault]))
    assert main(["training"]) == 1


def test_rounding_does_not_hide_what_is_not_attention(same_text, monkeypatch):
    """In the model's own dtype, the fault that shows most: 40 times as far from eager attention as may be."""
    monkeypatch.setattr(transformer, "cute_attn", lambda **_: FAULTS["no gradient of the first values"])
    assert main(["training"]) == 1


def test_bad_usage_of_training(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["training", "--steps", "0"])
    assert "at least 1" in capsys.readouterr().err
