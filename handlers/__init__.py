"""Thin TorchServe adapters over `serve.runtime`. An archive names one of these modules as its handler."""
