"""Formats of detections for the gateway, `predict`, `bulk` and the client: KITTI, COCO, tables, Parquet.

They are written from answers as dictionaries, and import nothing but numpy; Parquet needs pyarrow when it is written.
"""
