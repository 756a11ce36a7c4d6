"""FLSL, DINO and the random start on the same photographs: the same ViT, steps and seeds. Every second epoch a backbone is kept, and all are scored afterwards.

    python experiments/comparison.py train flsl PHOTOS RUNS --seed 0                                                    (and dino; seeds 0, 1, 2)
    python experiments/comparison.py train flsl PHOTOS RUNS --seed 0 --settings augment=null --name flsl-untouched     (views whose colors are left alone)
    python experiments/comparison.py score RUNS PHOTOS --camvid DIR --out nbs/experiments/results/comparison.json
    python experiments/comparison.py show RUNS --camvid DIR --out nbs/experiments/results
    python experiments/comparison.py ends RUNS PHOTOS --camvid DIR --coco DIR --davis DIR --out nbs/experiments/results/comparison_ends.json    (more scores of starts and ends)
    python experiments/comparison.py starts PHOTOS --camvid DIR --coco DIR --davis DIR --out nbs/experiments/results/comparison_starts.json    (random starts of five seeds)
"""
import argparse, json, time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from sklearn.datasets import load_sample_image

from densessl.theory.attention import attention_weights, unit_vectors
from densessl.data.augment import make_views
from densessl.evaluation.network import kept_photographs
from densessl.training.choices import change_settings, parse_kwargs
from densessl.data.images import image_dls
from densessl.evaluation.probes import dense_scores
from densessl.evaluation.figures import show_aggregated_similarity, show_probing
from densessl.evaluation.neighbors import tsne_layers
from densessl.methods.flsl import FLSLConfig, flsl_recipe
from densessl.evaluation.gauges import centers_in_view, label_free_gauges
from densessl.data.labelled import labelled_data, segmentation_folder
from densessl.training.learner import learner, methods
from densessl.theory.matching import cell_centers
from densessl.methods.export import export_backbone, load_backbone
from densessl.evaluation.video import davis_score
from densessl.data.views import Augment

COMMON = dict(img_size=64, local_size=32, n_local=2, hidden_dim=512, bottleneck_dim=128, pos_scale=.25, lr=8e-3, drop_path_rate=0., momentum=(.99,1.), temp_t=(.04,.04), wd=(.04,.04), freeze_epochs=0)
SMALL = dict(flsl=COMMON | dict(beta_sa=10., beta_ca=20., n_prototypes=512), dino=COMMON | dict(n_prototypes=1024))   # changes to the paper's settings
CAMVID = ('sky', 'building', 'pole', 'road', 'pavement', 'tree', 'sign', 'fence', 'car', 'pedestrian', 'bicyclist')
VIT = dict(patch_size=8, embed_dim=128, depth=4, num_heads=4)

def loaders(photos, recipe, seed): return image_dls(photos, recipe, bs=32, num_workers=0, valid_pct=.032, seed=seed, canvas=96)

def train(a):
    "One run"
    m, out = methods[a.method], Path(a.runs)/f'{a.name or a.method}_{a.seed}'
    set_seed(a.seed)
    config = change_settings(replace(m.presets['paper'], **SMALL[a.method]), parse_kwargs(a.settings, 'settings'))
    dls = loaders(a.photos, m.recipe(config), a.seed)
    learn = learner(dls, 'vit_tiny_patch16_224', m, config, model_kwargs=VIT)
    class Keep(Callback):
        order = 90   # after the teacher's update
        def after_epoch(self):
            if (self.epoch+1)%2==0: export_backbone(learn, out/f'e{self.epoch+1:02d}.safetensors')
    export_backbone(learn, out/'e00.safetensors')
    began = time.time()
    with learn.no_bar(), learn.no_logging(): learn.fit(a.epochs, cbs=Keep())
    (out/'history.json').write_text(json.dumps(dict(config=asdict(learn.model.config), seed=a.seed, photographs=len(dls.train.dataset), steps=len(learn.recorder.losses),
        minutes=(time.time()-began)/60, history=learn.collapse_monitor.history)))

def score(a):
    "All backbones of all runs; each is added to the file as soon as it is scored"
    out = Path(a.out)
    res = json.loads(out.read_text()) if out.exists() else {}
    train, test = (segmentation_folder(a.camvid, s, size=(176,240), n_classes=11, ignore_index=11)[::2] for s in ('train', 'test'))
    for d in sorted(p.parent for p in Path(a.runs).glob('*/history.json')):
        h = json.loads((d/'history.json').read_text())
        seed = int(d.name.split('_')[-1])
        photos, hw, _ = kept_photographs(loaders(a.photos, methods['dino'].recipe(methods['dino'].presets['scenes']), seed))
        r = res.setdefault(d.name, dict(config=h['config'], steps=h['steps'], scores={}))
        for f in sorted(d.glob('e*.safetensors')):
            if f.stem in r['scores']: continue
            enc, label = load_backbone(f), f'{d.name}/{f.stem}'
            s = dense_scores(enc, train, test, memory=20000, label=label) + label_free_gauges(enc, photos, hw, 64, label=label, data=f'photographs kept apart, seed {seed}')
            r['scores'][f.stem] = [dict(probe=o.probe, value=o.value, protocol=o.line) for o in s]
            out.write_text(json.dumps(res))
            print(label, {o.probe: round(100*o.value, 1) for o in s}, flush=True)

def coco(root):
    "Training and test part, classes grouped by what they belong to"
    groups = {c['id']: c['supercategory'] for c in json.loads((Path(root)/'classes.json').read_text())}
    names = tuple(sorted(set(groups.values())))
    return labelled_data(root, size=(176,240), layout='coco-panoptic', ignore_index=(0, -1), remap={k: names.index(v) for k,v in groups.items()}, classes=names)

@torch.no_grad()
def positives(enc, photos, hw, augment, beta=20.):
    "Share of FLSL's cross-attention from a student view that falls on the teacher's tokens within 1.5 cells of the query's own place"
    torch.manual_seed(0)
    views = make_views(flsl_recipe(FLSLConfig(img_size=64, local_size=32, augment=augment)), photos, hw)
    s, t = views['student'], views['teacher']
    grid = enc.grid(64, 64)
    at, cells = centers_in_view(s.boxes[0], t.boxes[0], grid), cell_centers(torch.tensor([0.,0.,1.,1.]), grid)
    near = ((at[:,:,None]-cells).abs()*torch.tensor(grid[::-1])).amax(-1)<1.5
    zs, zt = (unit_vectors(enc.tokens(v.images[0])) for v in (s, t))
    return (attention_weights(zs, zt, beta)*near).sum(-1)[((at>0)&(at<1)).all(-1)].mean().item()

def ends(a):
    "Starts and ends only, by the probes that take long, and where FLSL's positives are"
    out = Path(a.out)
    res = json.loads(out.read_text()) if out.exists() else {}
    camvid, things = [segmentation_folder(a.camvid, s, size=(176,240), n_classes=11, ignore_index=11)[::2] for s in ('train', 'test')], coco(a.coco)
    for f in sorted([*Path(a.runs).glob('dino_*/e00.safetensors'), *Path(a.runs).glob('*/e16.safetensors')]):
        key = f'{f.parent.name}/{f.stem}'
        if key in res: continue
        enc = load_backbone(f)
        s = dense_scores(enc, *camvid, label=key, probes=('clustering', 'overclustering')) + dense_scores(enc, *things, memory=20000, label=key) + davis_score(enc, a.davis, size=120, label=key)
        photos, hw, _ = kept_photographs(loaders(a.photos, methods['dino'].recipe(methods['dino'].presets['scenes']), int(f.parent.name.split('_')[-1])))
        found = [dict(probe=f'positives in place, {k}', value=positives(enc, photos, hw, v), protocol='student and teacher view of the photographs kept apart, beta 20, within 1.5 cells') for k,v in (('colors changed', Augment()), ('colors untouched', None))]
        res[key] = [dict(probe=o.probe, value=o.value, protocol=o.line) for o in s] + found
        out.write_text(json.dumps(res))
        print(key, found, [(o.probe, round(100*o.value, 1)) for o in s], flush=True)

def start_of(a, seed):
    "The backbone that a run of this seed begins with"
    m = methods['dino']
    set_seed(seed)
    config = replace(m.presets['paper'], **SMALL['dino'])
    dls = loaders(a.photos, m.recipe(config), seed)
    return learner(dls, 'vit_tiny_patch16_224', m, config, model_kwargs=VIT).model.backbone.eval()

def starts(a):
    """Two more random starts beside the first backbones of the three runs, by the same scores; gauges of all five on the photographs that each run kept apart"""
    out = Path(a.out)
    res = json.loads(out.read_text()) if out.exists() else {}
    recipe = methods['dino'].recipe(methods['dino'].presets['scenes'])
    camvid = [segmentation_folder(a.camvid, s, size=(176,240), n_classes=11, ignore_index=11)[::2] for s in ('train', 'test')]
    kept = {f'photographs kept apart, seed {s}': kept_photographs(loaders(a.photos, recipe, s))[:2] for s in (0, 1, 2)}
    backbones = {seed: start_of(a, seed) for seed in range(5)}
    def gauges(enc): return [o for data,photos in kept.items() for o in label_free_gauges(enc, *photos, 64, data=data)]
    kinds = {'gauges': (backbones, gauges),
             'CamVid': ((3, 4), lambda enc: dense_scores(enc, *camvid, memory=20000)),
             'COCO': ((3, 4), lambda enc: dense_scores(enc, *coco(a.coco), memory=20000)),
             'clusters': ((3, 4), lambda enc: dense_scores(enc, *camvid, probes=('clustering', 'overclustering'))),
             'DAVIS': ((3, 4), lambda enc: davis_score(enc, a.davis, size=120))}
    for kind,(seeds, judge) in kinds.items():
        for seed in seeds:
            found = res.setdefault(str(seed), {})
            if kind in found: continue
            scores = judge(backbones[seed])
            found[kind] = [dict(probe=o.probe, value=o.value, protocol=o.line) for o in scores]
            out.write_text(json.dumps(res))
            print(kind, seed, [(o.probe, round(100*o.value, 2)) for o in scores], flush=True)

def show(a):
    "The posters' pictures of one seed: aggregated similarity and attention on two photographs of scikit-learn (CC BY), t-SNE of labelled patches"
    out, runs = Path(a.out), Path(a.runs)
    backbones = {'random': load_backbone(runs/f'dino_{a.seed}'/'e00.safetensors'), **{m.upper(): load_backbone(runs/f'{m}_{a.seed}'/'e16.safetensors') for m in SMALL}}
    photos = torch.stack([torch.from_numpy(load_sample_image(f'{n}.jpg')).permute(2, 0, 1)[:, :, 100:527] for n in ('china', 'flower')])
    photos = torch.nn.functional.interpolate(photos, size=(192,192), mode='bilinear', antialias=True)
    jpg = lambda fig, name: fig.savefig(out/f'comparison_{name}.jpg', dpi=60, pil_kwargs=dict(quality=80))
    jpg(show_aggregated_similarity(backbones, photos, layers=[1, 3]), 'ass')
    for p,patch in (('china', (.3,.6)), ('flower', (.5,.5))): jpg(show_probing(backbones, photos[int(p=='flower')], patch), f'probing_{p}')
    data = segmentation_folder(a.camvid, 'test', size=(176,240), n_classes=11, ignore_index=11)[::6]
    tsne_layers(backbones, data.images, data.masks, CAMVID, layers=[1, 3], ignore_index=11).savefig(out/'comparison_tsne.png', dpi=60)

P = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
S = P.add_subparsers(required=True)
t = S.add_parser('train'); t.set_defaults(f=train); t.add_argument('method', choices=SMALL); t.add_argument('photos'); t.add_argument('runs')
t.add_argument('--seed', type=int, default=0); t.add_argument('--epochs', type=int, default=16); t.add_argument('--settings', default=''); t.add_argument('--name')
s = S.add_parser('score'); s.set_defaults(f=score); s.add_argument('runs'); s.add_argument('photos'); s.add_argument('--camvid', required=True); s.add_argument('--out', default='comparison.json')
e = S.add_parser('ends'); e.set_defaults(f=ends); e.add_argument('runs'); e.add_argument('photos'); e.add_argument('--out', default='comparison_ends.json')
for o in ('--camvid', '--coco', '--davis'): e.add_argument(o, required=True)
b = S.add_parser('starts'); b.set_defaults(f=starts); b.add_argument('photos'); b.add_argument('--out', default='comparison_starts.json')
for o in ('--camvid', '--coco', '--davis'): b.add_argument(o, required=True)
w = S.add_parser('show'); w.set_defaults(f=show); w.add_argument('runs'); w.add_argument('--camvid', required=True); w.add_argument('--seed', type=int, default=0); w.add_argument('--out', default='.')
for p in (t, s, e, b, w): p.add_argument('--threads', type=int, default=1)
a = P.parse_args()
torch.set_num_threads(a.threads)
a.f(a)
