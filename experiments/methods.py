"""Every method on the drawn scenes, with the settings and epochs of its preset, beside its start and its null. One row a run, kept in a file of results.

    python experiments/methods.py byol mae --seeds 0,1,2 --out nbs/experiments/results/methods.json
    python experiments/methods.py all --null --seeds 0 --out nbs/experiments/results/methods.json

A row that the file has already is not run again. About three minutes a row on two CPU cores.
"""
import argparse, json, tempfile, warnings
from pathlib import Path

from densessl.cli import pretrain
from densessl.training.learner import methods

PROBES = ('nearest neighbor', 'linear')

def in_percent(scores, model): return {s.probe: round(100*s.value, 2) for s in scores if s.model==model and s.probe in PROBES}

def run(name, seed, null):
    "Scores of the frozen start and of the trained network, in percent"
    m = methods[name]
    settings = ','.join(f'{k}={v!r}' for k,v in m.null.items()) if null else ''
    with tempfile.TemporaryDirectory() as d:
        _, _, learn = pretrain(method=name, seed=seed, settings=settings, score_every=0, out=f'{d}/run')
    score = learn._dense_score
    start, end = (in_percent(score.scores, model) for model in ('before training', f'epoch {m.scene_epochs}'))
    return dict(method=name, seed=seed, null=settings, network=m.scene_arch, epochs=m.scene_epochs, start=start, end=end)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('methods', nargs='+')
    p.add_argument('--seeds', default='0')
    p.add_argument('--null', action='store_true')
    p.add_argument('--out', required=True)
    a = p.parse_args()
    warnings.simplefilter('ignore')
    names, out = list(methods) if a.methods==['all'] else a.methods, Path(a.out)
    for seed in map(int, a.seeds.split(',')):
        for name in names:
            rows = json.loads(out.read_text()) if out.exists() else []
            if a.null and not methods[name].null or any((r['method'], r['seed'], bool(r['null']))==(name, seed, a.null) for r in rows): continue
            rows.append(run(name, seed, a.null))
            out.write_text(json.dumps(rows, indent=1))
            print(rows[-1], flush=True)
