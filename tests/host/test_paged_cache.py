"""The page allocator against a plain model: a list of tokens for each sequence.

A token is a number that is written where the table says, into both layers, as ``attention_kvcache`` would. Reading a sequence
back then finds another's token in each page that has had two writers, and whatever a copy has left out.
"""

from __future__ import annotations

import copy
import copyreg
import itertools
import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from cute_attn import PagedCache
from tests import caches

LAYERS = 2


class Model:
    """A cache beside the tokens that each of its sequences must have."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.cache = PagedCache(pages, page_size, 1, 1, layers=LAYERS, dtype=torch.float64)
        self.cache.k.fill_(torch.nan), self.cache.v.fill_(torch.nan)
        self.rows = [x.view(LAYERS, -1).numpy() for x in (self.cache.k, self.cache.v)]
        self.tokens: dict[int, list[int]] = {}
        self.next_token = 0

    def new(self) -> int:
        sequence = self.cache.new()
        assert sequence not in self.tokens
        self.tokens[sequence] = []
        return sequence

    def fork(self, sequence: int, length: int | None = None) -> int:
        free = self.cache.free_pages
        fork = self.cache.fork(sequence, length)
        assert fork not in self.tokens
        assert self.cache.free_pages == free
        self.tokens[fork] = self.tokens[sequence][:length]
        return fork

    def free(self, sequence: int) -> None:
        self.cache.free(sequence)
        del self.tokens[sequence]

    def append(self, sequences: list[int], counts: list[int]) -> bool:
        """Whether there was room; where there was not, all is as it was."""
        free = self.cache.free_pages
        try:
            lengths = self.cache.append(sequences, counts).tolist()
        except MemoryError:
            assert self.cache.free_pages == free
            for sequence in sequences:
                self.check(sequence)
            return False
        assert lengths == [len(self.tokens[sequence]) for sequence in sequences]
        for sequence, n in zip(sequences, counts, strict=True):
            new = range(self.next_token, self.next_token + n)
            self.next_token += n
            self.tokens[sequence] += new
            places = self.places(sequence)[len(self.tokens[sequence]) - n :]
            for rows in self.rows:
                rows[:, places] = np.array(new)
        return True

    def pages(self, sequence: int) -> np.ndarray:
        return self.cache.page_table([sequence])[0].numpy()

    def places(self, sequence: int) -> np.ndarray:
        """The row of each token, among those of all pages."""
        t, pages = np.arange(len(self.tokens[sequence])), self.pages(sequence)
        assert len(pages) == -(-len(t) // self.cache.page_size)
        return pages[t // self.cache.page_size] * self.cache.page_size + t % self.cache.page_size

    def check(self, sequence: int) -> None:
        tokens = self.tokens[sequence]
        assert self.cache.lengths([sequence]).tolist() == [len(tokens)]
        places = self.places(sequence)
        for rows in self.rows:
            assert (rows[:, places] == np.array(tokens)).all()

    def check_all(self) -> None:
        for sequence in self.tokens:
            self.check(sequence)
        owners = Counter(page for sequence in self.tokens for page in self.pages(sequence).tolist())
        assert self.cache.free_pages == self.cache.pages - len(owners), "a page is lost, or has two lives"


class Operations(RuleBasedStateMachine):
    """Of few pages, so that it is full often."""

    sequences = Bundle("sequences")

    def __init__(self):
        super().__init__()
        self.model = Model(pages=6, page_size=3)

    @rule(target=sequences)
    def new(self):
        return self.model.new()

    @rule(target=sequences, sequence=sequences, part=st.none() | st.floats(0, 1))
    def fork(self, sequence, part):
        return self.model.fork(sequence, None if part is None else round(part * len(self.model.tokens[sequence])))

    @rule(sequence=consumes(sequences))
    def free(self, sequence):
        self.model.free(sequence)

    @rule(sequences=st.lists(sequences, unique=True, max_size=4), data=st.data())
    def append(self, sequences, data):
        sizes = st.lists(st.integers(0, 5), min_size=len(sequences), max_size=len(sequences))
        self.model.append(sequences, data.draw(sizes))

    @invariant()
    def holds(self):
        self.model.check_all()


TestOperations = pytest.mark.filterwarnings("ignore::pytest.PytestCollectionWarning")(Operations.TestCase)
TestOperations.settings = settings(max_examples=60, stateful_step_count=40)


def test_a_hundred_thousand_operations():
    """Random ones, of sequences that come and go in a cache which is full now and then; at last every page is free again."""
    draw, model, full = random.Random(0), Model(pages=64, page_size=4), 0
    for operation in range(100_000):
        sequences = list(model.tokens)
        kind = draw.choices(("append", "new", "fork", "free"), (12, 2, 2, 3 + len(sequences) // 8))[0]
        if kind == "new" or not sequences:
            model.new()
        elif kind == "fork":
            sequence = draw.choice(sequences)
            model.fork(sequence, draw.choice((None, draw.randint(0, len(model.tokens[sequence])))))
        elif kind == "free":
            sequence = draw.choice(sequences)
            model.check(sequence)
            model.free(sequence)
        else:
            sequences = draw.sample(sequences, min(len(sequences), draw.randint(1, 3)))
            full += not model.append(sequences, draw.choices((0, 1, 1, 3, 9), k=len(sequences)))
        if operation % 1000 == 0:
            model.check_all()
    assert full > 1000
    for sequence in list(model.tokens):
        model.free(sequence)
    assert model.cache.free_pages == model.cache.pages


def test_tables_and_lengths():
    """What attention_kvcache takes: the lengths before, the pages in order, and no page where there is none."""
    cache = PagedCache(8, 4, 2, 16, head_dim_v=8, layers=3, dtype=torch.bfloat16)
    assert (cache.k.shape, cache.v.shape, cache.k.dtype) == ((3, 8, 4, 2, 16), (3, 8, 4, 2, 8), torch.bfloat16)
    a, b = cache.new(), cache.new()
    assert cache.append([a, b], [9, 4]).tolist() == [0, 0]
    assert cache.append([b, a]).tolist() == [4, 9]
    assert cache.lengths([a, b]).tolist() == cache.lengths(np.array([a, b])).tolist() == [10, 5]
    assert cache.append([a, b], np.array([0, 0])).tolist() == cache.append([a, b], torch.tensor([0, 0])).tolist() == [10, 5]
    table = cache.page_table([b, a])
    assert table.dtype == cache.lengths([a]).dtype == torch.int32
    assert (table.shape, table[0, 2]) == ((2, 3), -1)
    assert len(table.unique()) == 6
    assert torch.equal(cache.page_table([b, a], columns=5)[:, :3], table)
    assert (cache.page_table([b, a], columns=5)[:, 3:] == -1).all()
    assert (cache.page_table([]).shape, cache.lengths([]).shape, cache.append([]).shape) == ((0, 0), (0,), (0,))


def test_who_keeps_a_shared_page():
    """Of all that share the last page and append to it at once, one keeps it: there is room for the others' copies, and no more
    is asked for."""
    model = Model(pages=4, page_size=4)
    sequence = model.new()
    model.append([sequence], [6])
    sharers = [sequence, model.fork(sequence), model.fork(sequence)]
    assert model.cache.free_pages == 2
    assert model.append(sharers, [1, 1, 1])
    assert model.cache.free_pages == 0
    model.check_all()
    pages = model.cache.page_table(sharers)
    assert (pages[:, 0] == pages[0, 0]).all()
    assert len(pages[:, 1].unique()) == 3


def test_no_memory_for_a_copy(monkeypatch):
    """Of a shared page: nothing has changed, and the next one who appends gets its copy."""
    model = Model(pages=4, page_size=4)
    first = model.new()
    model.append([first], [6])
    fork = model.fork(first)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "index_select", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
        with pytest.raises(torch.OutOfMemoryError):
            model.cache.append([fork], 1)
    model.check_all()
    assert model.append([fork, first], [1, 1])
    model.check_all()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_of_the_cache(copied, monkeypatch):
    """Goes on by itself; from Python 3.14 on iterators can't be copied."""
    monkeypatch.setitem(copyreg.dispatch_table, itertools.count, lambda _: pytest.fail("an iterator is copied"))
    cache = PagedCache(4, 4, 1, 1)
    first = cache.new()
    cache.append([first], 6)
    other = copied(cache)
    assert other.fork(first) == cache.new() == first + 1
    other.append([first], 4)
    assert (other.free_pages, cache.free_pages, cache.lengths([first]).tolist()) == (0, 2, [6])


def test_made_in_inference_mode():
    """And used on both sides of it."""
    with torch.inference_mode():
        model = Model(pages=4, page_size=4)
        first = model.new()
        model.append([first], [6])
    second = model.fork(first)
    assert model.append([first, second], [1, 1])
    with torch.inference_mode():
        third = model.fork(first, 6)
        assert model.append([third], [1])
    model.check_all()


def test_full():
    """In words, and nothing has changed: not even of those sequences for which there was room."""
    cache = PagedCache(3, 4, 1, 1)
    a, b = cache.new(), cache.new()
    cache.append([a], 8)
    words = "1 of 3 pages are free; 2 of 4 tokens are needed for 5 more tokens of 2 sequences: free.. a sequence"
    with pytest.raises(MemoryError, match=words):
        cache.append([b, a], [4, 1])
    assert cache.lengths([a, b]).tolist() == [8, 0]
    assert cache.free_pages == 1
    cache.append([b], 4)
    cache.free(b)
    cache.append([a], 4)
    assert cache.free_pages == 0


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page_size", [1, 4])
def test_attention_to_pages_of_a_cache(page_size):
    caches.check_pages(page_size=page_size)
