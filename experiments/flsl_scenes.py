"""FLSL on drawn scenes: the settings of the preset over seeds, what changes when one of them is changed, and the supervised bound.

    python experiments/flsl_scenes.py --out nbs/experiments/results/flsl_scenes.json [--only NAME ...]
Each run is added to the file as soon as it is done.
"""
import argparse, copy, json, time
from dataclasses import asdict, replace
from pathlib import Path

import torch, torch.nn.functional as F
from fastai.torch_core import set_seed

from densessl import __version__
from densessl.cli import parse_kwargs, scene_vit, scenes_and_judge
from densessl.encoders import dense_encoder
from densessl.evaluation import patch_labels
from densessl.flsl import presets
from densessl.learner import flsl_learner
from densessl.synthetic import CLASSES, draw_scenes

P = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
P.add_argument('--out', required=True); P.add_argument('--only', nargs='*'); P.add_argument('--epochs', type=int, default=32); P.add_argument('--threads', type=int, default=1)
a = P.parse_args()
torch.set_num_threads(a.threads)
base = presets['scenes']
RUNS = {f'preset, seed {s}': (base, s) for s in (0, 1, 2)} | {
    'beta 2 and 4, seed 0': (replace(base, beta_sa=2., beta_ca=4.), 0),
    'pos_scale 1, seed 0': (replace(base, pos_scale=1.), 0),
    'gamma 1, seed 0': (replace(base, gamma=1.), 0)}

def small(scores): return [{k: v for k,v in asdict(s).items() if k in ('probe', 'value', 'per_class', 'protocol')} for s in scores]

def supervised(judge, seed=0, epochs=32):
    "The same network on the same scenes, trained with their masks, one label a patch"
    set_seed(seed)
    enc = dense_encoder('vit_tiny_patch16_224', img_size=64, pos_scale=base.pos_scale, **parse_kwargs(scene_vit))
    x, m = draw_scenes(1024, 80, seed=seed, natural=True)
    x = F.interpolate(x, size=(64,64), mode='bicubic', antialias=True)
    y = patch_labels(F.interpolate(m[:,None].float(), size=(64,64), mode='nearest-exact')[:,0].long(), (8,8), len(CLASSES))[0].flatten(2).mT
    head = torch.nn.Linear(enc.embed_dim, len(CLASSES))
    opt = torch.optim.AdamW([*enc.parameters(), *head.parameters()], lr=1e-3)
    mean, std = (torch.tensor(t)[:,None,None] for t in ((0.485,0.456,0.406), (0.229,0.224,0.225)))
    for i in range(epochs*32):
        j = torch.randint(1024, (32,))
        loss = F.cross_entropy(head(enc.tokens((x[j]/255.-mean)/std)).flatten(0, 1), y[j].flatten(0, 1))
        opt.zero_grad(); loss.backward(); opt.step()
    return small(judge(enc, 'supervised'))

out = Path(a.out)
res = json.loads(out.read_text()) if out.exists() else dict(version=__version__, torch=torch.__version__, epochs=a.epochs, steps=a.epochs*32, runs={})
def add(name, r):
    res['runs'][name] = r
    out.write_text(json.dumps(res, indent=1))
    print(name, {k: [round(100*s['value'], 1) for s in v] for k,v in r.items() if k in ('before', 'after')}, flush=True)

for name,(config, seed) in RUNS.items():
    if name in res['runs'] or (a.only and name not in a.only): continue
    set_seed(seed)
    dls, judge, _ = scenes_and_judge(config, 32, seed)
    learn = flsl_learner(dls, 'vit_tiny_patch16_224', config, model_kwargs=parse_kwargs(scene_vit), monitor_every=32)
    start = copy.deepcopy(learn.model.teacher['encoder'])
    began = time.time()
    with learn.no_bar(), learn.no_logging(): learn.fit(a.epochs)
    add(name, dict(before=small(judge(start, 'before')), after=small(judge(learn.model.teacher['encoder'], 'after')), minutes=round((time.time()-began)/60, 2),
                   config=asdict(learn.model.config), history=[h for h in learn.collapse_monitor.history if h['step']%32==0]))
if 'supervised' not in res['runs'] and not a.only: add('supervised', dict(after=supervised(scenes_and_judge(base, 32, 0)[1])))
