"""Formats in which detections leave the project, for the gateway, `predict` and the client: KITTI, COCO, tables.

They are written from answers as dictionaries, and import nothing but numpy.
"""
