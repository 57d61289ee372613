"""Block masks: which tiles a mask hides, cuts and leaves whole, the lists that kernels read, and attention with them."""

import copy
import io
import pickle
import xml.etree.ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask
from torch.nn.attention.flex_attention import create_block_mask

from cute_attn import BlockMask, attention, block_mask, layouts, masks
from cute_attn.blocks import BY_ROWS, CUT, NONE, WHOLE
from cute_attn.layouts.base import (
    BLOCK,
    HEADER,
    IN_TURN,
    MEMBER_BIT,
    TILE_BITS,
    TILE_MASK,
    UNSEEN_BIT,
    WARPGROUP_BITS,
    WHOLE_BIT,
)
from cute_attn.plan import plan
from cute_attn.problem import Problem
from tests.functions import BLOCKED, check
from tests.support import make_qkv

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(1, 300), st.integers(1, 300))


def pairs(mask, batch, heads, sq, sk) -> torch.Tensor:
    """Which query sees which key, (batch, heads, sq, sk)."""
    places = torch.meshgrid(*(torch.arange(n) for n in (batch, heads, sq, sk)), indexing="ij")
    return mask(*places).expand(batch, heads, sq, sk)


def kinds_of(seen: torch.Tensor, tile_m: int, tile_n: int) -> torch.Tensor:
    """The kinds of tiles by looking at all their pairs, one tile after another."""
    batch, heads, sq, sk = seen.shape
    kinds = torch.zeros(batch, heads, -(-sq // tile_m), -(-sk // tile_n), dtype=torch.uint8)
    for m in range(kinds.shape[2]):
        for n in range(kinds.shape[3]):
            tile = seen[:, :, m * tile_m : (m + 1) * tile_m, n * tile_n : (n + 1) * tile_n].flatten(2)
            whole = tile.all(2) & ((n + 1) * tile_n <= sk)
            kinds[:, :, m, n] = tile.any(2).byte() + whole.byte()
    return kinds


def kinds_of_blocks(seen: torch.Tensor) -> torch.Tensor:
    """Those of a block mask: where each row of one that is cut sees all of it or none, it says so."""
    kinds, sk = kinds_of(seen, BLOCK, BLOCK), seen.shape[3]
    for m in range(kinds.shape[2]):
        for n in range(sk // BLOCK):
            block = seen[:, :, m * BLOCK : (m + 1) * BLOCK, n * BLOCK : (n + 1) * BLOCK]
            alike = (block.all(3) == block.any(3)).all(2) & kinds[:, :, m, n].eq(CUT)
            kinds[:, :, m, n] = kinds[:, :, m, n].masked_fill(alike, BY_ROWS)
    return kinds


def random_mask(seed: int):
    """Some whole stretches, some holes."""
    table = torch.rand(3, 4, 12, 12, generator=torch.Generator().manual_seed(seed))

    def mask(batch, head, q_idx, kv_idx):
        share = table[batch, head, q_idx // 32, kv_idx // 32]
        return (share < 0.3) | ((share < 0.6) & ((q_idx + kv_idx) % 5 != 0))

    return mask


# ---- kinds -----------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(sizes=SIZES, seed=st.integers(0, 9), tile=st.sampled_from([(32, 32), (64, 64), (192, 128), (128, 96), (32, 256)]))
def test_kinds_are_those_of_all_pairs(sizes, seed, tile):
    mask = random_mask(seed)
    found = block_mask(mask, *sizes)
    assert torch.equal(found.tiles(*tile), kinds_of(pairs(mask, *sizes), *tile))
    assert found.density == pytest.approx(found.tiles(BLOCK, BLOCK).ne(NONE).double().mean().item())


@pytest.mark.parametrize("case", BLOCKED)
def test_kinds_of_ready_made_masks(case):
    mask = BLOCKED[case](2, 2, "cpu", 0).asked["mask"]
    found = block_mask(mask, 2, 2, 333, 290)
    assert torch.equal(found.kinds, kinds_of_blocks(pairs(mask, 2, 2, 333, 290)))
    assert found.kinds.eq(BY_ROWS).any() == (case in ("document", "nothing", "heads", "score"))


def test_many_pieces(monkeypatch):
    """As torch looks at them, a few rows at a time."""
    want = block_mask(masks.causal, 2, None, 300, 200).kinds
    monkeypatch.setattr("cute_attn.blocks.PIECE", 1)
    assert torch.equal(block_mask(masks.causal, 2, None, 300, 200).kinds, want)


def test_arguments_of_the_function_and_sizes_of_0():
    ids = torch.arange(100) // 40
    by_argument = block_mask(lambda b, h, i, j, ids: ids[i] == ids[j], None, None, 100, 100, tensors=(ids,))
    assert torch.equal(by_argument.kinds, block_mask(masks.document(ids), None, None, 100, 100, device="cpu").kinds)
    for sizes in ((1, 1, 0, 5), (1, 1, 5, 0), (0, 1, 5, 5)):
        empty = block_mask(masks.causal, *sizes)
        assert empty.density == 0.0
        assert "0 queries" in str(empty) or sizes[2]
        assert empty.to_svg()


# ---- lists -----------------------------------------------------------------------------------------------------------


def entries(words: torch.Tensor) -> tuple[list[int], int, int, int]:
    """``(entries, how many cut ones come first, how many there are, the third word)`` of a list."""
    cut, total, third, *_ = words.tolist()
    return words.tolist()[HEADER:][:total], cut, total, third


def check_turns(lists: torch.Tensor):
    """Each list of a head has its turn, none before a longer one."""
    turns, counts = lists[..., IN_TURN].long(), lists[..., 1]
    assert torch.equal(turns.sort(-1).values, torch.arange(turns.shape[-1]).expand(turns.shape))
    assert counts.gather(-1, turns).diff().le(0).all()


@settings(max_examples=20)
@given(sizes=SIZES, seed=st.integers(0, 9), tile=st.sampled_from([(192, 128), (128, 64), (128, 96), (64, 32)]))
def test_lists_of_keys(sizes, seed, tile):
    batch, heads, *lengths = sizes
    mask = random_mask(seed)
    seen = pairs(mask, *sizes)
    lists = block_mask(mask, *sizes).key_lists(*tile, batch, heads)
    check_turns(lists)
    for b, h, m in torch.cartesian_prod(*(torch.arange(n) for n in lists.shape[:3])).tolist():
        listed, cut, _, whole_end = entries(lists[b, h, m])
        parts = [
            [(entry & TILE_MASK) * BLOCK for entry in part]
            for part in (listed[:cut], listed[cut:whole_end], listed[whole_end:])
        ]
        assert all(part == sorted(part, reverse=True) for part in parts)
        rows, times = seen[b, h, m * tile[0] : (m + 1) * tile[0]], torch.zeros(lengths[1] + tile[1], dtype=torch.int32)
        for part, is_whole in zip(parts, (False, True, False), strict=True):
            for n in part:
                times[n : n + tile[1]] += 1
                assert rows[:, n : n + tile[1]].any()
                assert is_whole == bool(rows[:, n : n + tile[1]].all() and n + tile[1] <= lengths[1])
        assert times.max() <= 1
        assert not rows[:, times[: lengths[1]] == 0].any()
        assert len(listed) <= -(-lengths[1] // tile[1])
        assert all(n < min(parts[1]) for n in parts[2])
        assert not parts[1] or all(n > min(parts[1]) for n in parts[0])
        for entry in listed:
            n = (entry & TILE_MASK) * BLOCK
            for w in range(tile[0] // 64):
                rows = slice(m * tile[0] + 64 * w, min(m * tile[0] + 64 * (w + 1), lengths[0]))
                said = [(entry >> TILE_BITS + WARPGROUP_BITS * w + bit) & 1 for bit in (UNSEEN_BIT, WHOLE_BIT)]
                part = seen[b, h, rows, n : n + tile[1]]
                assert said == [not part.any(), part.all() and n + tile[1] <= lengths[1]] or not part.numel()


def test_kinds_in_a_row():
    """Of a block and the next three; there is none past the last key."""
    blocks = block_mask(random_mask(3), 2, 1, 300, 270)
    kinds, rows = torch.nn.functional.pad(blocks.kinds, (0, 3), value=NONE), blocks.kinds_in_a_row(2, 4)
    assert rows.shape == (2, 4, 10, 9)
    for i in range(4):
        assert torch.equal((rows >> 2 * i) & 3, kinds[..., i : i + 9].expand(-1, 4, -1, -1))


@settings(max_examples=20)
@given(sizes=SIZES, seed=st.integers(0, 9), tile=st.sampled_from([(128, 128), (64, 128), (64, 96)]), alike=st.booleans())
def test_lists_of_queries(sizes, seed, tile, alike):
    """Each tile of each head that shares the keys once; ranks are the order of its key tiles, of which there are ``visits``."""
    batch, heads, *lengths = sizes
    mask = random_mask(seed)
    of_heads = 1 if alike else heads
    blocks = block_mask(mask, batch, of_heads, *lengths)
    seen = pairs(mask, batch, of_heads, *lengths)
    kinds = kinds_of(seen, *tile).expand(-1, heads, -1, -1)
    ranks = blocks.ranks(*tile, batch, heads)
    for heads_kv in {1, heads, max(heads // 2, 1)}:
        group = heads // heads_kv
        lists = blocks.query_lists(*tile, heads // heads_kv, batch, heads_kv)
        for b, h, n in torch.cartesian_prod(*(torch.arange(x) for x in (batch, heads_kv, kinds.shape[3]))).tolist():
            listed, cut, _, _ = entries(lists[b, h, n])
            for kind, found in ((CUT, listed[:cut]), (WHOLE, listed[cut:])):
                visited = [(h * group + (entry >> MEMBER_BIT), entry & TILE_MASK) for entry in found]
                for entry, (head, m) in zip(found, visited, strict=True):
                    for w in range(2 * (tile[1] == 128)):
                        first, rows = n * tile[1] + 64 * w, slice(m * tile[0], (m + 1) * tile[0])
                        part = seen[b, head % of_heads, rows, first : first + 64]
                        assert entry >> TILE_BITS + w & 1 == int(part.all() and first + 64 <= lengths[1])
                assert len(set(visited)) == len(visited)
                want = kinds[b, h * group : (h + 1) * group, :, n].eq(kind).nonzero() + torch.tensor([h * group, 0])
                assert sorted(visited) == sorted(map(tuple, want.tolist()))
    seen_tiles = kinds.ne(NONE).int()
    assert torch.equal(ranks, (seen_tiles.cumsum(3) - seen_tiles).int())
    assert torch.equal(blocks.visits(*tile, batch, heads), seen_tiles.sum(3, keepdim=True).int())


def test_every_tile_is_made_of_blocks():
    """Of every GPU, mechanism, head dim and pass: tables of new ones, too."""
    for target in layouts.known_targets():
        for mechanism in layouts.for_target(target).MECHANISMS:
            for d in (32, 64, 96, 128, 192, 256):
                for gradients in ("", "qkv"):
                    config = plan(Problem("bfloat16", d, d, gradients=gradients), target, mechanism)
                    assert config.tile_m % BLOCK == config.tile_n % BLOCK == 0


def test_lists_are_made_once(monkeypatch):
    blocks = block_mask(masks.causal, None, None, 300, 300)
    first = blocks.key_lists(128, 128, 2, 3)
    assert first.shape == (2, 3, 3, HEADER + 4)
    monkeypatch.setattr(BlockMask, "_enlisted", lambda *_: pytest.fail("made again"))
    assert torch.equal(blocks.key_lists(128, 128, 2, 3), first)


# ---- as an object ----------------------------------------------------------------------------------------------------


def test_saved_moved_and_copied():
    blocks = block_mask(masks.causal, None, 2, 300, 200)
    blocks.key_lists(128, 128, 1, 2)
    file = io.BytesIO()
    torch.save(blocks, file)
    file.seek(0)
    for other in (
        pickle.loads(pickle.dumps(blocks)), copy.deepcopy(blocks), blocks.to("cpu"), torch.load(file)
    ):  # fmt: skip
        assert torch.equal(other.kinds, blocks.kinds)
        assert (other.seqlen_q, other.seqlen_k, other.batch, other.heads) == (300, 200, 1, 2)
        assert torch.equal(other.key_lists(128, 128, 1, 2), blocks.key_lists(128, 128, 1, 2))


def test_drawn():
    text = str(block_mask(masks.causal, None, None, 128, 128))
    assert text.splitlines()[1:] == ["░   ", "█░  ", "██░ ", "███░"]
    assert "62.5% of its blocks" in text
    large = block_mask(masks.window(100), None, None, 10_000, 7_000)
    rows = str(large).splitlines()[1:]
    assert len(rows) <= 32
    assert max(map(len, rows)) <= 64
    picture = xml.etree.ElementTree.fromstring(large.to_svg())
    assert len(picture) > 50
    assert picture[0].text == repr(large)
    without_values = large.to("meta")
    text = "BlockMask(batch 1, heads 1, 10000 queries × 7000 keys, on meta)"
    assert str(without_values) == repr(without_values) == text


# ---- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", BLOCKED)
def test_reference(case):
    check(case, (2, 150, 170), (4, 2), (16, 24), torch.float64, "cpu", blocks=True, backend="reference")


@pytest.mark.parametrize("case", ["causal", "document", "heads"])
def test_the_mask_decides(case):
    """With a block mask, one that several calls share, and without: the same bits."""
    q, k, v = make_qkv(2, 150, 170, 4, 2, 16, 16)
    mask = BLOCKED[case](2, 4, "cpu", 0).asked["mask"]
    blocks = block_mask(mask, 2, 4, 150, 170)
    for scale in (None, 0.3):
        got = attention(q, k, v, mask=mask, block_mask=blocks, scale=scale)
        assert torch.equal(got, attention(q, k, v, mask=mask, scale=scale))


# Masks that attention-gym publishes, by their definition: https://github.com/meta-pytorch/attention-gym
def natten(canvas: int, kernel: int):
    """A query on a square canvas sees a square of keys around it, moved inside at the edges."""

    def mask(batch, head, q_idx, kv_idx):
        seen = None
        for q, kv in ((q_idx // canvas, kv_idx // canvas), (q_idx % canvas, kv_idx % canvas)):
            middle = torch.clamp(q, kernel // 2, canvas - 1 - kernel // 2)
            near = (middle - kv).abs() <= kernel // 2
            seen = near if seen is None else seen & near
        return seen

    return mask


def dilated_window(width: int, step: int):
    return lambda b, h, q_idx, kv_idx: ((q_idx - kv_idx).abs() <= width) & ((q_idx - kv_idx) % step == 0) & (q_idx >= kv_idx)


def transfusion(begin: torch.Tensor, length: torch.Tensor):
    """Causal, but that a stretch of each sequence sees itself."""

    def mask(b, h, q_idx, kv_idx):
        end = begin[b] + length[b]
        return (q_idx >= kv_idx) | ((q_idx >= begin[b]) & (kv_idx >= begin[b]) & (q_idx < end) & (kv_idx < end))

    return mask


GYM = {
    "document": masks.and_masks(masks.document(torch.arange(160) // 37), masks.causal),
    "prefix": masks.prefix_lm(torch.tensor([20, 90])),
    "sliding window": lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx <= 40),
    "dilated": dilated_window(60, 3),
    "natten": natten(12, 5),
    "transfusion": transfusion(torch.tensor([10, 70]), torch.tensor([40, 64])),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", GYM)
def test_published_masks(name):
    """As FlexAttention takes them, in its block mask, in ours, and in none."""
    mask, n = GYM[name], 144
    q, k, v = make_qkv(2, n, n, 4, 2, 16, 16, torch.float64)
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k.repeat_interleave(2, 2)) / 4.0
    P = scores.masked_fill(~pairs(mask, 2, 4, n, n), -torch.inf).softmax(-1)
    want = torch.einsum("bhmn,bnhd->bmhd", P, v.repeat_interleave(2, 2))
    flex = create_block_mask(mask, 2, None, n, n, device="cpu")
    for asked in (
        {"mask": mask}, {"mask": mask, "block_mask": block_mask(mask, 2, None, n, n)}, {"block_mask": flex},
        {"mask": mask, "block_mask": flex},
    ):  # fmt: skip
        torch.testing.assert_close(attention(q, k, v, **asked), want)


@pytest.mark.parametrize("side", [32, 128, (64, 32)])
@pytest.mark.parametrize("sizes", [(300, 300), (100, 333)])
def test_flex_attentions_block_masks(side, sizes):
    mask = random_mask(1)
    flex = create_block_mask(mask, 2, 4, *sizes, device="cpu", BLOCK_SIZE=side)
    q, k, v = make_qkv(2, *sizes, 4, 2, 16, 16)
    from cute_attn.blocks import _from_flex_attention

    blocks, function = _from_flex_attention(flex)
    assert function is mask
    assert _from_flex_attention(flex)[0] is blocks
    ours = block_mask(mask, 2, 4, *sizes)
    assert (blocks.kinds.eq(NONE) <= ours.kinds.eq(NONE)).all()
    assert (blocks.kinds.eq(WHOLE) <= ours.kinds.eq(WHOLE)).all()
    assert not blocks.kinds.eq(BY_ROWS).any()
    assert torch.equal(attention(q, k, v, block_mask=flex), attention(q, k, v, mask=mask))


def test_flex_attentions_block_mask_without_a_function():
    """What it doesn't list is hidden."""
    counts, columns = torch.tensor([[[1, 2]]]), torch.tensor([[[[1, 0], [0, 1]]]])
    flex = FlexBlockMask.from_kv_blocks(counts, columns.int(), BLOCK_SIZE=32, seq_lengths=(64, 64))
    q, k, v = make_qkv(2, 64, 64, 2, 2, 16, 16)
    got = attention(q, k, v, block_mask=flex)
    want = attention(q, k, v, mask=lambda b, h, i, j: (i >= 32) | (j >= 32))
    torch.testing.assert_close(got, want)


def test_flex_attentions_block_masks_on_streams_and_in_graphs(monkeypatch):
    """What is made of one is kept, and another stream waits for it; but not what a CUDA graph records, which has no values
    before its first replay."""
    from cute_attn import blocks

    class OnGpu(torch.Tensor):
        is_cuda = True
        record_stream = lambda self, stream: stream.reads.append(self)  # noqa: E731

    class Stream:
        def __init__(self, number):
            self.number, self.reads, self.waits_for = number, [], []
            self.wait_event = self.waits_for.append
            self.record_event = lambda: f"event of {number}"

    streams, capturing = [Stream(1), Stream(2)], [True]
    monkeypatch.setattr(blocks, "raw_stream", lambda _: streams[0].number)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: streams[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    flex = create_block_mask(masks.causal, None, None, 100, 100, device="cpu")
    flex.kv_num_blocks = flex.kv_num_blocks.as_subclass(OnGpu)
    recorded = blocks._from_flex_attention(flex)[0]
    capturing[0] = False
    made = blocks._from_flex_attention(flex)[0]
    assert made is not recorded
    assert blocks._from_flex_attention(flex)[0] is made
    assert not streams[0].waits_for
    streams.reverse()
    assert blocks._from_flex_attention(flex)[0] is made
    assert streams[0].waits_for == ["event of 1"]
    assert [x is made.kinds for x in streams[0].reads] == [True]


def test_a_slice_of_flex_attentions_block_mask_is_refused():
    """It says that it is of all queries, and has blocks of some."""
    q, k, v = make_qkv(1, 300, 300, 2, 2, 16, 16)
    flex = create_block_mask(masks.causal, None, None, 300, 300, device="cpu")[:, :, 0:1]
    with pytest.raises(ValueError, match="block_mask has 1 rows of blocks of 128 queries; as many as its 300 queries"):
        attention(q, k, v, mask=masks.causal, block_mask=flex)


def test_lists_of_no_keys():
    found = block_mask(masks.causal, None, None, 64, 0)
    assert found.key_lists(128, 128, 1, 1).shape[:3] == (1, 1, 1)
    assert found.query_lists(128, 128, 1, 1, 1).shape[2] == 0
