"""A method on drawn scenes: its preset over seeds, what changes when one setting is changed, its null, and the supervised bound.

    python experiments/scenes.py flsl --out nbs/experiments/results/flsl_scenes.json [--only NAME ...]
    python experiments/scenes.py flsl --out nbs/experiments/results/flsl_scenes.json --starts 5    (score the random starts only)
Each run is added to the file as soon as it is done. A start with batch norm is scored with statistics gathered on training views.
"""
import argparse, copy, json, time
from dataclasses import asdict, replace
from pathlib import Path

import torch, torch.nn.functional as F
from fastai.torch_core import set_seed

from densessl import __version__
from densessl.evaluation.network import training_views
from densessl.job import scene_data
from densessl.training.choices import change_settings, parse_kwargs
from densessl.methods.encoders import dense_encoder
from densessl.evaluation.features import patch_labels
from densessl.evaluation.probes import dense_scores
from densessl.training.learner import learner as learner_of, methods
from densessl.ground.synthetic import CLASSES, draw_scenes
from densessl.evaluation.verdict import gather_statistics

P = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
P.add_argument('method', choices=methods); P.add_argument('--out', required=True); P.add_argument('--only', nargs='*')
P.add_argument('--epochs', type=int, help='default: those of the main job'); P.add_argument('--threads', type=int, default=1); P.add_argument('--starts', type=int, default=0, help='score so many random starts of each network, and train nothing'); P.add_argument('--settings', default='', help='changes to the preset, for all runs')
a = P.parse_args()
torch.set_num_threads(a.threads)
method = methods[a.method]
a.epochs = a.epochs or method.scene_epochs
base = change_settings(method.presets['scenes'], parse_kwargs(a.settings, 'settings'))
cnn, vit = methods['clove'], methods['flsl']

def run(config=base, seed=0, net=method): return config, seed, net
RUNS = {f'preset, seed {s}': run(seed=s) for s in (0, 1, 2)} | dict(
    flsl=lambda: {'beta 2 and 4, seed 0': run(replace(base, beta_sa=2., beta_ca=4.)),
          'pos_scale 1, seed 0': run(replace(base, pos_scale=1.)),
          'gamma 1, seed 0': run(replace(base, gamma=1.)),
          'on a CNN, seed 0': run(net=cnn)},
    clove=lambda: {f'{name}, seed {s}': run(replace(base, **changes), s) for s in (0, 1, 2) for name,changes in (
               ('matches by chance', dict(match='chance')), ('cosine attention', dict(cosine=True)), ("public code's loss", dict(reduction='mean', margin=100.)))} | {
           'margin 0.5, seed 0': run(replace(base, margin=.5)),
           'on a ViT, seed 0': run(net=vit)})[a.method]()

def scenes_and_judge(recipe, bs, seed):
    dls, (train, test), _ = scene_data(recipe, bs, seed)
    return dls, lambda enc, name: dense_scores(enc, train, test, label=name)

def small(scores): return [{k: v for k,v in asdict(s).items() if k in ('probe', 'value', 'per_class', 'protocol')} for s in scores]

def supervised(judge, seed=0):
    "The same network on the same scenes, trained with their masks, one label a cell"
    set_seed(seed)
    enc = dense_encoder(method.scene_arch, img_size=64, **(dict(pos_scale=base.pos_scale) if a.method=='flsl' else {}), **parse_kwargs(method.scene_kwargs))
    x, m = draw_scenes(1024, 80, seed=seed, natural=True)
    x = F.interpolate(x, size=(64,64), mode='bicubic', antialias=True)
    y = patch_labels(F.interpolate(m[:,None].float(), size=(64,64), mode='nearest-exact')[:,0].long(), (8,8), len(CLASSES))[0].flatten(2).mT
    head = torch.nn.Linear(enc.embed_dim, len(CLASSES))
    opt = torch.optim.AdamW([*enc.parameters(), *head.parameters()], lr=1e-3)
    mean, std = (torch.tensor(t)[:,None,None] for t in ((0.485,0.456,0.406), (0.229,0.224,0.225)))
    for i in range(a.epochs*32):
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

def learner(config, seed, net):
    "The learner of a run, and how it is scored"
    set_seed(seed)
    dls, judge = scenes_and_judge(method.recipe(config), 32, seed)
    return learner_of(dls, net.scene_arch, method, config, model_kwargs=parse_kwargs(net.scene_kwargs), monitor_every=32), judge

def start_of(learn):
    "A copy of the backbone before training, its batch-norm statistics gathered on training views"
    return gather_statistics(copy.deepcopy(learn.model.backbone), training_views(learn.dls))

def score_starts(n):
    "The random starts of each network over seeds; runs that began with one of them take over its scores"
    for network,net in dict(CNN=cnn, ViT=vit).items():
        if not any(r[2].scene_arch==net.scene_arch for r in RUNS.values()): continue
        found = res.setdefault('starts', {}).setdefault(network, {})
        for seed in range(n):
            if str(seed) in found: continue
            learn, judge = learner(base, seed, net)
            found[str(seed)] = small(judge(start_of(learn), 'before'))
            for name,(config, s, other) in RUNS.items():
                if network=='CNN' and s==seed and other.scene_arch==net.scene_arch and name in res['runs']: res['runs'][name]['before'] = found[str(seed)]
            out.write_text(json.dumps(res, indent=1))
            print(network, seed, [round(100*o['value'], 1) for o in found[str(seed)]], flush=True)

if a.starts:
    score_starts(a.starts)
    raise SystemExit

for name,(config, seed, net) in RUNS.items():
    if name in res['runs'] or (a.only and name not in a.only): continue
    learn, judge = learner(config, seed, net)
    start = start_of(learn)
    began = time.time()
    with learn.no_bar(), learn.no_logging(): learn.fit(a.epochs)
    add(name, dict(before=small(judge(start, 'before')), after=small(judge(learn.model.backbone, 'after')), minutes=round((time.time()-began)/60, 2),
                   config=asdict(learn.model.config), history=[h for h in learn.collapse_monitor.history if h['step']%32==0]))
if 'supervised' not in res['runs'] and (not a.only or 'supervised' in a.only): add('supervised', dict(after=supervised(scenes_and_judge(method.recipe(base), 32, 0)[1])))
