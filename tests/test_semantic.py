"Semantic segmentation: the values of mmsegmentation, data that move together, learning, resume, two processes"
import importlib.util, json, math
from dataclasses import replace

import pytest, torch
import torch.distributed as dist
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from golden_numbers import GOLDEN
from PIL import Image
from safetensors.torch import load_file
from test_distributed import run
from torch import nn
from torch.testing import assert_close

from densessl.data.labelled import labelled_data
from densessl.data.segmentation import SegmentationData
from densessl.evaluation.scores import image_counts, read_scores, write_scores
from densessl.ground.core import InputError
from densessl.ground.synthetic import CLASSES, draw_scenes
from densessl.methods.encoders import dense_encoder
from densessl.methods.export import export_backbone
from densessl.training.precision import AutocastBF16
from densessl.training.resume import SaveRun
from densessl.transfer.pyramid import FeaturePyramid
from densessl.transfer.recipe import FineTune
from densessl.transfer.semantic import (IGNORED, LabelledImages, ScaledCrop, Segmenter, SegmenterConfig, SemanticFPN, SemanticScore, segment,
                                        segmentation_loss, semantic_dls, semantic_learner, semantic_scores)

pytestmark = pytest.mark.usefixtures('one_thread')
SMALL = SegmenterConfig(channels=32, width=32)

# ---- reference values

class Given(nn.Module):
    "Maps that are given, in place of those of an encoder"
    def __init__(self, maps): super().__init__(); self.maps = maps
    def forward(self, x): return self.maps

@pytest.mark.parametrize('inputs,logits,strides', (('x','logits',(4,8,16,32)), ('same','logits_same',(16,)*4)))
def test_semantic_fpn(inputs, logits, strides):
    "Neck and head of mmsegmentation, with maps of four strides and, as in FLSL's code, of one"
    g = load_file(GOLDEN/'transfer/semantic_fpn.safetensors')
    w = {k.removeprefix('w.'): v for k,v in g.items() if k.startswith('w.')}
    neck = FeaturePyramid(dense_encoder('test_vit', 64, embed_dim=8, num_heads=2), strides, 16, [0,0,1,1])
    neck.taps, neck.adapters = Given([g[f'{inputs}{i}'] for i in range(4)]), nn.ModuleList(nn.Identity() for _ in range(4))
    ours = dict(lateral_convs='inner_blocks', fpn_convs='layer_blocks')
    neck.fpn.load_state_dict({f'{ours[k.split(".")[1]]}.{k.split(".")[2]}.0.{k.split(".")[-1]}': v for k,v in w.items() if k.startswith('neck.')})
    head = SemanticFPN((4,8,16,32), 16, 12, 5).eval()      # also where all maps have one stride
    state = {}
    for k,v in w.items():
        if k.startswith('decode_head.'): state[k.removeprefix('decode_head.').replace('scale_heads', 'levels').replace('conv_seg', 'last').replace('.conv.', '.0.').replace('.bn.', '.1.')] = v
    want = {k for k in head.state_dict() if 'num_batches' not in k}
    assert want==state.keys()
    head.load_state_dict(state, strict=False)
    assert_close(head(list(neck(None).values())[:-1]), g[logits], rtol=1e-5, atol=1e-5)

def test_scores_are_those_of_mmsegmentation():
    m = json.loads((GOLDEN/'transfer/metrics.json').read_text())
    said, labels, want = torch.tensor(m['prediction']), torch.tensor(m['label']), m['reference']['semantic']
    C = len(want['IoU'])
    known = (labels>=0) & (labels<C)
    assert math.isnan(want['Acc'][-1]) and want['IoU'][-1]==0, 'a class that is only predicted'
    scores, ious = semantic_scores(image_counts(*[o.reshape(-1, *o.shape[-2:]) for o in (said, labels.masked_fill(~known, IGNORED))], C, IGNORED))
    assert scores==pytest.approx({k: want[k] for k in ('mIoU', 'aAcc', 'mAcc')}, abs=1e-6)
    assert ious==pytest.approx(want['IoU'], abs=1e-6)

# ---- data

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Scenes of several sizes; the green of an image is 30 times its label, the border is ignored"
    d = tmp_path_factory.mktemp('labelled')
    sizes = ((40,56), (64,48), (50,90), (72,72))
    for split,n,seed in (('train', 8, 0), ('val', 4, 1)):
        for kind in ('images', 'labels'): (d/kind/split).mkdir(parents=True)
        for i,(image,mask) in enumerate(zip(*draw_scenes(n, 96, seed))):
            h, w = sizes[i%4]
            labels = mask[:h,:w].clone()
            image = image[:,:h,:w].clone()
            image[1] = 30*labels
            labels[:3] = 255
            Image.fromarray(image.permute(1,2,0).numpy()).save(d/'images'/split/f'{i}.png')
            Image.fromarray(labels.byte().numpy()).save(d/'labels'/split/f'{i}.png')
    (d/'classes.txt').write_text('\n'.join(CLASSES))
    return d

@pytest.fixture
def files(folder): return labelled_data(folder, size=None, load=False, ignore_index=255, say=None)

def one_class_around(labels, r=2):
    "Where all pixels within `r` have the same label"
    f = labels.float()[None]
    return (nn.functional.max_pool2d(f, 2*r+1, 1, r)==-nn.functional.max_pool2d(-f, 2*r+1, 1, r))[0]

def test_images_and_labels_move_together(files):
    torch.manual_seed(0)
    train, _ = files
    data = LabelledImages(train, ScaledCrop(48, 40, 200, color=False, fill=(0,0,0)))
    seen, ignored, right = 0, 0, []
    for i in range(40):
        image, labels = data[i%8]
        assert image.shape==(3,48,48) and labels.shape==(48,48) and image.dtype==torch.uint8
        inner = one_class_around(labels, 4) & (labels!=IGNORED)
        right.append(image[1][inner]==30*labels[inner])
        seen, ignored = seen+int((labels[inner]>0).sum()), ignored+int((labels==IGNORED).sum())
    assert torch.cat(right).float().mean()>.99, 'all but slivers narrower than a pixel'
    assert seen>3000 and ignored>3000, (seen, ignored)
    recipe = ScaledCrop(48, 40, 200)
    image, labels = data.data.one(*train.pairs[0])
    colors = torch.stack([recipe(image, labels.long())[0].float().mean((1,2)) for _ in range(30)])
    assert colors.std(0).min()>3, 'colors are jittered'

def test_a_crop_shows_several_classes():
    "A class that fills most of an image fills at most three quarters of a crop, where that can be had"
    torch.manual_seed(0)
    labels = torch.zeros(64, 64, dtype=torch.long)
    labels[24:40,24:40] = 1
    image = labels.byte().expand(3, -1, -1)
    largest = lambda most: [torch.bincount(ScaledCrop(24, 64, 64, (1.,1.), most, color=False)(image, labels)[1].flatten()).max()/24**2 for _ in range(60)]
    assert sum(o>=.75 for o in largest(.75))<6 and sum(o>=.75 for o in largest(1.))>20

def test_whole_images_of_any_size(files):
    "Evaluation shows whole images one by one; the scores are those of single images, at the size of the labels"
    train, test = files
    torch.manual_seed(0)
    for test_size in (None, (32,64)):
        dls = semantic_dls(train, test, 4, ScaledCrop(32, 40, 200), test_size, device='cpu')
        learn = semantic_learner(dls, dense_encoder('test_resnet', 64), SMALL, cbs=SemanticScore())
        for m in learn.model.modules():
            if isinstance(m, nn.Conv2d) and m.bias is not None and len(m.bias)==7: nn.init.normal_(m.weight)
        with learn.no_bar(): learn.validate()
        counts = []
        for i,(image,labels) in enumerate(LabelledImages(test)):
            small = dls.valid.dataset[i][0]
            assert (min(small.shape[1:])==32 or max(small.shape[1:])==64) if test_size else torch.equal(small, image)
            said = segment(learn.model, small, labels.shape)
            assert said.shape==labels.shape
            counts.append(image_counts(said[None], labels[None], 7, IGNORED))
        want, _ = semantic_scores(torch.cat(counts))
        assert len(test)==4 and learn.scores==pytest.approx(want, abs=1e-3) and 0<want['aAcc']<1

def test_an_image_is_filled_up_to_the_stride():
    "What is added right and below does not show"
    model = Segmenter(dense_encoder('test_vit', 64), 7, SMALL).eval()
    nn.init.normal_(model.head.last.weight)
    image = draw_scenes(1, 96)[0][:,:,:64]
    full = torch.tensor((124,116,104)).byte().view(3,1,1).repeat(1, 1, 64, 96)
    full[...,:33,:70] = image[...,:33,:70]
    a, b = model(image[...,:33,:70]), model(full)
    assert model.step==32 and a.shape==(1,7,33,70)
    assert (a-b[...,:33,:70]).abs().max()<.05*b.std()
    same = Segmenter(dense_encoder('test_vit', 64), 7, replace(SMALL, taps=(0,0,1,1), strides=(16,)*4))
    assert same.step==16 and len(same.maps(torch.zeros(1, 3, 48, 48)))==4

# ---- training

def scenes(n, seed): return SegmentationData(*draw_scenes(n, 64, seed, n_objects=(1,3), natural=True, noise=.05), 7, name=f'{n} scenes', classes=CLASSES)

def make(train, test, fit, seed=0, cbs=(), head=SMALL, every=100):
    set_seed(seed, reproducible=True)
    dls = semantic_dls(train, test, fit.batch, device='cpu')
    return semantic_learner(dls, dense_encoder('test_resnet', 64), head, fit, [SemanticScore(every), *cbs])

def train(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(learn.recipe.epochs)
    return learn

def test_learning_beats_the_start_and_labels_of_other_images(tmp_path):
    fit, a, b = FineTune(8, rate=4e-3, decay=.01, warmup=.05), scenes(96, 0), scenes(48, 1)
    learn = make(a, b, fit)
    with learn.no_bar(): learn.validate()
    start = learn.scores['mIoU']
    got = train(learn).scores['mIoU']
    null = train(make(replace(a, masks=a.masks.roll(1, 0)), b, fit)).scores['mIoU']
    assert start<.1 and null<.15 and got>null+.08, (start, null, got)
    records = learn.semantic_score.records('cnn', seed=0)
    assert [r.probe for r in records]==['mIoU', 'aAcc', 'mAcc'] and records[0].value==got
    assert sum(v for v in records[0].per_class if v==v)/sum(v==v for v in records[0].per_class)==pytest.approx(got)
    assert read_scores(write_scores(records, tmp_path/'scores.json'))[0].id==records[0].id

def test_ignored_pixels_do_not_teach():
    "The gradient of the logits is zero there, and what stands there does not matter"
    z = torch.randn(2, 3, 4, 4, requires_grad=True)
    labels = torch.randint(3, (2, 8, 8))
    labels[:,:4] = IGNORED
    loss = segmentation_loss(z, labels)
    z.grad, = torch.autograd.grad(loss, z)
    assert (z.grad[:,:,0]==0).all() and (z.grad[:,:,2:]!=0).all()
    big = nn.functional.interpolate(z, (8,8), mode='bilinear').log_softmax(1)
    terms = [-big[b,labels[b,y,x],y,x] for b in range(2) for y in range(4,8) for x in range(8)]
    assert_close(loss, sum(terms)/128)
    assert segmentation_loss(z, torch.full_like(labels, IGNORED))==0

@pytest.mark.parametrize('head', ('fpn', 'linear'))
def test_bf16(head):
    a = scenes(16, 0)
    learn = make(a, a, FineTune(1, batch=8), head=replace(SMALL, head=head))
    learn.model.eval()
    full = learn.model(a.images)
    with torch.autocast('cpu', torch.bfloat16): half = learn.model(a.images)
    assert half.dtype==torch.float32 and (half-full).abs().max()<.05*full.abs().max()
    train(learn.add_cb(AutocastBF16()))
    assert math.isfinite(learn.recorder.losses[-1]) and all(p.dtype==torch.float32 for p in learn.model.parameters())

class Killed(Exception): pass

class Kill(Callback):
    "Ends the process, as it were, after some steps"
    order = 2000
    def __init__(self, at): self.at = at
    def after_batch(self):
        if self.training and self.train_iter==self.at: raise Killed('now')

def test_a_resumed_run_is_the_same(tmp_path):
    fit, a, b = FineTune(2, batch=8, rate=1e-3), scenes(24, 0), scenes(8, 1)
    def made(seed, *cbs): return make(a, b, fit, seed, cbs, every=1)
    whole = train(made(0, SaveRun(tmp_path/'whole')))
    with pytest.raises(Killed): train(made(0, SaveRun(tmp_path/'cut', every=1), Kill(4)))
    again = train(made(9, SaveRun(tmp_path/'cut', resume=True)))
    assert all(torch.equal(v, again.model.state_dict()[k]) for k,v in whole.model.state_dict().items())
    assert torch.equal(torch.stack(whole.recorder.losses), torch.stack(again.recorder.losses)) and len(again.recorder.losses)==6
    assert len(whole.semantic_score.history)==2 and whole.scores==again.scores and whole.semantic_score.history==again.semantic_score.history

def test_resume_refuses_another_head_and_other_classes(tmp_path):
    fit, a = FineTune(1, batch=8), scenes(8, 0)
    train(make(a, a, fit, 0, [SaveRun(tmp_path/'run')]))
    with pytest.raises(InputError, match='config.width was 32, now 16'):
        train(make(a, a, fit, 0, [SaveRun(tmp_path/'run', resume=True)], replace(SMALL, width=16)))
    b = replace(a, classes=tuple('abcdefg'))
    with pytest.raises(InputError, match="classes.0 was 'background', now 'a'"):
        train(make(b, b, fit, 0, [SaveRun(tmp_path/'run', resume=True)]))

@pytest.mark.parametrize('arch,head', (('test_resnet', SMALL), ('test_vit', SMALL), ('test_vit', SegmenterConfig('linear')),
                                       ('test_vit', replace(SMALL, taps=(0,0,1,1), strides=(16,)*4))))
def test_every_parameter_has_a_gradient(arch, head):
    "Several processes wait for the gradient of every parameter that trains"
    a = scenes(4, 0)
    model = semantic_learner(semantic_dls(a, a, 4, device='cpu'), dense_encoder(arch, 64), head).model
    segmentation_loss(model(torch.randint(256, (2, 3, 64, 64)).byte()), torch.randint(7, (2, 64, 64))).backward()
    assert not [n for n,p in model.named_parameters() if p.requires_grad and p.grad is None]

def as_they_are(image, labels): return image, labels

def in_processes(rank, world, bs):
    "What a small fit leaves, of `world` processes with `bs` images each"
    set_seed(0)
    a, b = scenes(8, 0), scenes(5, 1)
    a.masks[:,:20] = 0
    a = replace(a, ignore_index=6)
    dls = semantic_dls(a, b, bs, as_they_are, device='cpu')
    fit = FineTune(1, batch=4, optimizer='sgd', rate=.01, warmup=0)
    learn = semantic_learner(dls, dense_encoder('test_resnet', 64), replace(SMALL, dropout=0.), fit, SemanticScore())
    learn.model.double()
    learn.add_cb(DoubleImages())
    if world>1:
        with learn.distrib_ctx(cpu=True): train(learn)
    else: train(learn)
    return dict(state={k: v.clone() for k,v in learn.model.state_dict().items()}, scores=learn.scores)

class DoubleImages(Callback):
    "fastai's recorder has float32"
    def after_loss(self): self.learn.loss = self.learn.loss.float()

@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason='needs gloo')
@pytest.mark.skipif(importlib.util.find_spec('accelerate') is None, reason='needs accelerate')
def test_two_processes_are_one(tmp_path):
    "Weights, statistics over both batches, and scores, though five images make unequal parts"
    want, got = in_processes(0, 1, 4), run(in_processes, 2, tmp_path/'two', 2, limit=200)
    for r in got:
        assert r['scores']==pytest.approx(want['scores'], abs=1e-9)
        for k,v in want['state'].items():
            if v.is_floating_point(): assert_close(r['state'][k], v, rtol=1e-5, atol=1e-7, msg=lambda m: f'{k}: {m}')

@pytest.mark.parametrize('kind', ('encoder', 'file', 'learner'))
def test_an_encoder_from_anywhere(tmp_path, kind):
    "The network starts from the weights of a file or a learner, and is normalized as it was"
    a, encoder = scenes(8, 0), dense_encoder('test_resnet', 64)
    dls = semantic_dls(a, a, 8, device='cpu')
    if kind=='file': export_backbone(encoder, tmp_path/'net.safetensors', mean=(.5,)*3, std=(.4,)*3)
    source = tmp_path/'net.safetensors' if kind=='file' else encoder
    if kind=='learner': source = semantic_learner(dls, encoder, 'linear', FineTune(frozen=True))
    learn = semantic_learner(dls, source, SMALL)
    got, want = (o.net.state_dict() for o in (learn.encoder, encoder))
    assert all(torch.equal(got[k], v) for k,v in want.items()) and (learn.encoder is encoder)==(kind=='encoder')
    assert learn.model.mean.flatten().tolist()==pytest.approx([.5]*3 if kind=='file' else [.485,.456,.406])
    assert all(p.requires_grad for p in learn.encoder.parameters()), 'all train, though those of the learner were frozen'
