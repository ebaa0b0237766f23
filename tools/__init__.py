"""Development tools: benchmarks, zoo sweep, demo training; in no image."""
