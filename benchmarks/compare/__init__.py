"""The pieces that the examples and the accuracy benchmark share: networks, a training loop, and the paper's scenarios.

Needs the ``examples`` extra. Nothing outside this folder depends on it.
"""
