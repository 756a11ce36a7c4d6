"""The golden numbers: made by running the public code of FLSL and CLoVE unchanged, read here for all tests.

    load = partial(golden, 'flsl')
    tensors, settings = load('step_default')
"""
import json
from pathlib import Path

from safetensors import safe_open

GOLDEN = Path(__file__).parent/'golden'
TOL = dict(rtol=1e-9, atol=1e-11)     # for float64


def golden(method, name):
    "Tensors by their names, and the settings they were made with"
    with safe_open(GOLDEN/method/f'{name}.safetensors', 'pt') as f:
        return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()['settings'])
