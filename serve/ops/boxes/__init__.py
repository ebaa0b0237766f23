"""Kernels on boxes: IoU, NMS, rotated boxes, polygons, quadrilaterals."""
