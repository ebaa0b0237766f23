"""Open Inference Protocol over gRPC: a second way into the same application, not a second application.

A call becomes a request of the HTTP application in the same process (`calls`, `translation`), so that keys, limits,
admission, deadlines, batching, errors, metrics and logs are those of HTTP. Needs the extra ``grpc``.
"""
