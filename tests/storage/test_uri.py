"""Addresses: what they name, what is refused, and path_mapping."""

from __future__ import annotations

import pytest

from serve.errors import UriError
from serve.storage import Location, is_remote, map_path, parse


@pytest.mark.parametrize(
    ("uri", "location", "name"),
    [
        ("data/000008.bin", Location("file", "data/000008.bin"), "000008.bin"),
        ("file:///data/a%20b.bin", Location("file", "/data/a b.bin"), "a b.bin"),
        ("s3://bucket/a/b.bin", Location("s3", "a/b.bin", "bucket"), "b.bin"),
        ("s3://bucket", Location("s3", "", "bucket"), ""),
        ("s3://bucket/a%2Fb #?.bin", Location("s3", "a%2Fb #?.bin", "bucket"), "a%2Fb #?.bin"),
        ("petrel://bucket/key", Location("s3", "key", "bucket"), "key"),
        ("ceph://bucket/key", Location("s3", "key", "bucket"), "key"),
        ("cluster1:s3://bucket/key", Location("s3", "key", "bucket", "cluster1"), "key"),
        ("https://host/x/y.pth?v=1", Location("http", "https://host/x/y.pth?v=1"), "y.pth"),
        ("lmdb:///data/f.lmdb#a/b.png", Location("lmdb", "/data/f.lmdb", member="a/b.png"), "b.png"),
        ("ffrecord://rel/p.ffr#v/8.bin", Location("ffrecord", "rel/p.ffr", member="v/8.bin"), "8.bin"),
    ],
)
def test_parse_returns_location_and_name(uri, location, name):
    assert parse(uri) == location and parse(uri).name == name


@pytest.mark.parametrize(
    ("uri", "hint"),
    [
        ("", "empty"),
        ("s3://bucket/a\nb", "control characters"),
        ("s3:///key", "bucket name"),
        ("s3://bucket/../other/key", "key"),
        ("s3://bucket/a/./b", "key"),
        ("ftp://host/x", "'ftp'"),
        ("file://host/x", "three slashes"),
        ("https:///x", "names no host"),
        ("http://[::1", "malformed"),
        ("http://host:99999/", "malformed"),
        ("lmdb://#key", "names no file"),
    ],
)
def test_malformed_uri_raises_uri_error(uri, hint):
    with pytest.raises(UriError, match=hint):
        parse(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIAKEY:topsecret@bucket/key",
        "https://me:topsecret@host/x",
        "s3://me@bucket/key",
        "c:s3://a:topsecret/x",
    ],
)
def test_credentials_in_a_uri_are_rejected_and_not_repeated(uri):
    with pytest.raises(UriError, match="aws configure") as caught:
        parse(uri)
    assert "topsecret" not in str(caught.value) and "AKIAKEY" not in str(caught.value)


def test_query_string_is_redacted():
    assert str(parse("https://host/x.pth?X-Amz-Signature=topsecret")) == "https://host/x.pth?…"


def test_plain_paths_are_not_remote():
    assert not is_remote("data/x.bin") and is_remote("file:///x") and is_remote("c:s3://b/x")


@pytest.mark.parametrize(
    ("path", "mapped"),
    [
        ("./data/nuscenes/samples/1.bin", "s3://openmmlab/datasets/detection3d/nuscenes/samples/1.bin"),
        ("data/nuscenes/samples/1.bin", "s3://openmmlab/datasets/detection3d/nuscenes/samples/1.bin"),
        ("data\\nuscenes\\samples\\1.bin", "s3://openmmlab/datasets/detection3d/nuscenes/samples/1.bin"),
        ("other/1.bin", "other/1.bin"),
        ("work/data/nuscenes/1.bin", "work/data/nuscenes/1.bin"),
    ],
)
def test_path_mapping_of_the_ceph_page_applies(path, mapped):
    mapping = {
        "./data/nuscenes/": "s3://openmmlab/datasets/detection3d/nuscenes/",
        "data/nuscenes/": "s3://openmmlab/datasets/detection3d/nuscenes/",
    }
    assert map_path(path, mapping) == mapped


@pytest.mark.parametrize("turned", [False, True])
def test_longest_prefix_applies_in_any_order(turned):
    pairs = [("data/", "s3://all/"), ("data/coco/", "s3://coco/"), ("data/coco/val/", "s3://val/")]
    mapping = dict(reversed(pairs) if turned else pairs)
    assert map_path("data/coco/val/1.jpg", mapping) == "s3://val/1.jpg"
    assert map_path("data/coco/1.jpg", mapping) == "s3://coco/1.jpg"
    assert map_path("data/kitti/1.bin", mapping) == "s3://all/kitti/1.bin"
    assert map_path("s3://coco/1.jpg", mapping) == "s3://coco/1.jpg"
