"""A module has one hash in all processes, so that captures on disk are found."""

import json
import os
import pathlib
import subprocess
import sys

import denoisers
from comfytp.importer.key import module_hash

_PROGRAM = """
import json, sys, denoisers
from comfytp.importer.key import module_hash
print(json.dumps({name: module_hash(denoisers.make(name)) for name in sys.argv[1:]}))
"""


def test_hash_is_the_same_in_a_process_with_another_past(make):
    ours = {name: module_hash(make(name)) for name in denoisers.FAMILIES}
    assert len(set(ours.values())) == len(ours)
    some = ["wan", "unet", "flux"]
    path = os.pathsep.join([str(pathlib.Path(__file__).parent), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", _PROGRAM, *some], env=environment, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1]) == {name: ours[name] for name in some}
