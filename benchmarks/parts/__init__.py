"""The parts of the attention kernels against the hardware's limits: ``python -m benchmarks parts --help``.

What is measured, each kernel in a file of its own:

- ``copies``: global → shared memory by plain loads, cp.async and TMA; ``products``: WGMMA and mma.sync;
- ``softmax``: online-softmax steps; ``epilogue``: O from registers to global memory;
- ``whole``: the forward kernel with stages left out or done twice; ``launch``: empty kernels, host and device.

Who does what: ``shapes`` names the configurations, ``catalogue`` lists the probes, ``kernels`` compiles them in a pool
of processes, ``worker`` measures (one *job* is a list of probes that take turns), ``limits`` derives what the hardware
allows, ``results``, ``show`` and ``plot`` keep and show it, ``verdict`` says what holds a configuration back, and
``command`` is the command line. ``stages`` and ``whole_*`` are the variants of the forward kernel, ``common`` what the
micro-kernels share.
"""
