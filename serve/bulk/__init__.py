"""Predictions of many frames on this machine's cores or GPUs, in parts that appear whole: ``mmdet3d-serve bulk``.

    DEST/bulk.json            source, model and options; results of another run are not mixed with it
    DEST/manifest.jsonl       the frames in order, one line each; fixed when the run is begun
    DEST/parts/00000012.jsonl  results of frames 12 n … 12 n + n - 1, one line each, in the order of the manifest
    DEST/parts/00000012.json   counts of that part, written before it
    DEST/summary.json         counts of all parts, once they are there

A part that exists is finished: it is written elsewhere and renamed, or put into the bucket at once. So a run can be
killed at any moment; begun again, it computes the parts that are missing, and there is exactly one line per frame.
"""
