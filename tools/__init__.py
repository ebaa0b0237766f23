"""Development tools: benchmarks, zoo sweep, demo training. Not part of any image."""
