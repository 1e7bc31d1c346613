"""Progress without a terminal, and the memory that the allocator of the CPU keeps."""

import logging
import subprocess
import sys

import pytest
from runs import ROOT

from timm_mldecoder.runtime import errors
from timm_mldecoder.runtime.log import logged


def test_progress_is_logged_every_few_seconds(caplog):
    caplog.set_level(logging.INFO)
    assert list(logged('Scoring', iter('abc'), 3, seconds=0)) == ['a', 'b', 'c']
    assert [record.getMessage().split(']')[0] for record in caplog.records] == [
        f'Scoring: [{number}/3' for number in (1, 2, 3)
    ]
    caplog.clear()
    assert list(logged('Scoring', range(3), 3)) == [0, 1, 2] and not caplog.records


ALLOCATE = """
import resource, sys
from timm_mldecoder.runtime.errors import keep_freed_memory
if sys.argv[1] == 'kept':
    keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    start = faults()
    bytearray(2**26)
print(faults() - start)
"""


@pytest.mark.skipif(errors.platform.libc_ver()[0] != 'glibc', reason='malloc of another library')
def test_freed_memory_is_kept_without_new_page_faults():
    faults = {}
    for kind, environment in (('kept', {}), ('default', {}), ('set up', {'MALLOC_ARENA_MAX': '2'})):
        command = [sys.executable, '-c', ALLOCATE, kind.replace('set up', 'kept')]
        env = {'PYTHONPATH': str(ROOT), **environment}
        faults[kind] = int(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)
    assert faults['kept'] * 10 < faults['default'] and faults['kept'] * 10 < faults['set up']
