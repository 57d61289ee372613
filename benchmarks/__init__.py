"""Attention against its peers: ``python -m benchmarks --help``.

Who does what, from the command down:

- ``__main__``: the command line; ``supervise``: keeps a measuring process alive and a result file up to date.
- ``worker``: the measuring process; ``runner``: one cell, with peers taking turns; ``host``: first calls.
- ``cases``, ``peers``, ``flops``: what is measured, against whom, how it is counted.
- ``timing``, ``card``, ``check``: clocks, the card's own readings, the float64 oracle.
- ``results``: the result file; ``report``, ``plot``, ``compare``, ``anchors``: what is made of it.

A *cell* is one case under one *kind* of measurement: ``burst``, ``sustained``, ``host`` or ``first``.
"""
