"""The workshop: benchmarks, zoo sweep, demonstration training. Not part of any image."""
