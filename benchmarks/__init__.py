"""Attention against its peers, forward and backward: ``python -m benchmarks --help``.

Who does what, from the command down:

- ``__main__``: the command line; ``supervise``: keeps a measuring process alive and a result file up to date.
- ``schedule``: which cell is visited when; ``ahead``: kernels compiled in parallel before any is measured.
- ``worker``: the measuring process; ``runner``: a visit to a cell, peers taking turns; ``host``: first calls.
- ``cases``, ``peers``, ``flops``: what is measured, against whom, how it is counted.
- ``timing``, ``card``, ``check``: clocks, the card's own readings, the float64 oracle.
- ``results``: the result file; ``report``, ``plot``, ``compare``, ``anchors``, ``documents``: what is made of it.
- ``training``, ``transformer``: a small model trained with ours and with eager attention. ``model``: a step of a Llama.
- ``masks``, ``serving``: users' functions beside other ways, attention to caches; ``context_parallel``: several cards.
- ``parts``: of the kernels, against the hardware's limits; ``layouts``, ``counters``: proofs against hardware counters.

A *cell* is one case under one *kind* of measurement: ``burst``, ``sustained``, ``host``, ``memory`` or ``first``. It takes
several *rounds*, in which every peer has a turn, spread over a few *visits*.
"""
