"""What spoiled settings of data and metrics raise while upstream's programs run."""

from __future__ import annotations

import pytest

from serve.errors import DataSetError
from serve.upstream.data_files import reading_explained


def test_format_only_without_a_name_for_its_files_is_a_sentence():
    from mmengine.registry import init_default_scope
    from mmengine.runner import Runner

    init_default_scope("mmdet")
    runner = Runner.__new__(Runner)
    with reading_explained(), pytest.raises(DataSetError, match="outfile_prefix"):
        runner.build_evaluator({"type": "mmdet.CocoMetric", "format_only": True})
