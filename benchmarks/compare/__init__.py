"""What the benchmarks compare methods with: networks, a training loop, and the paper's scenarios.

Imported as ``compare``, with this folder's parent on the path. Needs the ``examples`` extra; no part of the package.
"""
