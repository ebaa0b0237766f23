"""Labelling tools call a served model: an ML backend for Label Studio, and an auto-annotation function for CVAT."""
