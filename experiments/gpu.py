"""Is densessl right on a GPU, is it fast there, and does it learn? Three stages that fit into a quarter of an hour on one card.

    python experiments/gpu.py right fast --out OUT                                     150 seconds
    python experiments/gpu.py learns --pack photo_pack.zip --out OUT                   450 seconds, shared by the arms
    python experiments/gpu.py learns --pack photo_pack.zip --out OUT --arms flsl,dino --seconds 120 --settings flsl:beta_sa=5,beta_ca=10
    python experiments/gpu.py --tiny --out OUT                                         all of it in miniature, on a CPU

right    views, loss and gradients of each method beside those of the CPU in fp32, tf32, bf16, fp16; learners in each; export, resume, scores; what waits
fast     images a second, milliseconds of each part and memory of a step; the learner around it; compiled; decoding
learns   each arm trains for --seconds times its share on photographs that lie on the device; backbones are scored in processes beside it, half-way
         (without videos) and at the end, and so are random starts of three seeds

Each stage is a process with a time limit of its own. Every number is in OUT as soon as it is known, and tables are printed at the end. A pack is a zip file
or a folder with train/ (photographs) and camvid/, davis/ (what is scored); parts that are missing are left out.

The first run of `learns` (nbs/experiments/gpu.ipynb: batches of 512, teacher temperatures from 0.04 to 0.07, 70 seconds an arm) taught nothing: after 35 steps
all targets were uniform. What is expected of the second, written down before it. The temperature stays at 0.04. A step has 2,048 photographs, 49,152 queries
for FLSL's 4,096 prototypes and inverse temperatures 2 and 4. A random start scores about 15 % by nearest neighbor. DINO should end above its start by three
points or more: if it does not, the time was too short and says nothing of FLSL. FLSL should end above DINO in nearest neighbor and DAVIS, which ask for
dense features. Going on from DINO's network, FLSL should end above DINO that went on for the same seconds. If FLSL ends below its own start, look at the
curves first: `target_entropy` near ln K (targets uniform) asks for a lower temperature, few prototypes `used` for a larger gamma, a `spread` near 1 (each mode
is the mean of its view) for larger inverse temperatures, 5 and 10 first.
"""
import argparse
import contextlib
import copy
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')     # products whose sums have one order, where asked for
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.data.core import DataLoaders

from densessl.data.augment import make_views
from densessl.training.resume import SaveRun
from densessl.training.runfile import run_checkpoints
from densessl.evaluation.network import training_views
from densessl.training.choices import change_settings, parse_kwargs
from densessl.data.canvases import BadFiles
from densessl.data.folders import find_images
from densessl.data.images import MakeViews, ViewLoader, image_dls, scene_dls
from densessl.data.photographs import load_canvas
from densessl.methods.encoders import dense_encoder
from densessl.data.labelled import SegmentationData
from densessl.evaluation.gauges import correspondence_score
from densessl.evaluation.probes import dense_scores
from densessl.data.labelled import labelled_data
from densessl.training.learner import learner, methods
import densessl.training.pictures  # `show_views` and the like of a learner
from densessl.training.precision import compile_blocks
from densessl.training.optim import adamw, clip_per_parameter_, lars, split_decay
from densessl.ground.synthetic import CLASSES, draw_scenes
from densessl.methods.export import export_backbone
from densessl.evaluation.verdict import gather_statistics, has_batch_norm
from densessl.evaluation.video import davis_score
from densessl.methods.weights import open_backbone

LIMITS = dict(right=60, fast=90, learns=450)                        # seconds
PRECISIONS = dict(fp32=.99999, tf32=.999, bf16=.97, fp16=.98)       # cosine with the gradient of the CPU, at least
VIT = 'vit_tiny_patch16_224', dict(patch_size=8, embed_dim=48, depth=2, num_heads=3)
CNN = 'test_resnet', dict(output_stride=8, stem_width=8, channels=[16, 16, 16, 32])
NETWORKS = dict(flsl=VIT, clove=CNN, dino=VIT)
BEGAN = time.monotonic()


# ---- what the stages share

class Record(dict):
    "Numbers that are on the disk after every change"
    def __init__(self, path): self.path = Path(path)

    def put(self, name, value):
        self[name] = value
        part = self.path.with_suffix('.part')
        part.write_text(json.dumps(self, indent=1, default=str))
        os.replace(part, self.path)
        print(f'[{time.monotonic()-BEGAN:6.1f} s] {name}: {json.dumps(value, default=str)[:240]}', flush=True)
        return value

    def measure(self, name, f, *args, **kwargs):
        "What `f` returns, or its complaint, and how long it took"
        began = time.monotonic()
        try: value = f(*args, **kwargs)
        except Exception as e:
            lines = [f'{Path(o.filename).name}:{o.lineno}' for o in traceback.extract_tb(e.__traceback__)]
            value = dict(ok=False, error=f'{type(e).__name__}: {e}'[:500], at=lines[-6:])
        if torch.cuda.is_available(): torch.cuda.empty_cache()
        return self.put(name, value | dict(seconds=round(time.monotonic()-began, 2)))


def finish(device):
    "Wait until the device has done everything"
    if device.type=='cuda': torch.cuda.synchronize()


@contextlib.contextmanager
def products(how):
    "Float32 products and convolutions as they are, or in TF32, as they are beside half precision"
    was = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision('highest' if how=='fp32' else 'high')
    torch.backends.cudnn.allow_tf32 = how!='fp32'
    try: yield
    finally:
        torch.set_float32_matmul_precision(was[0])
        torch.backends.cudnn.allow_tf32 = was[1]


def autocast(how, device):
    "Forward pass in bf16 or fp16, else as it is"
    half = dict(bf16=torch.bfloat16, fp16=torch.float16).get(how)
    return torch.autocast(device.type, dtype=half, enabled=half is not None)


def small_settings(method):
    "Settings for a second on a CPU; nothing is drawn on the device"
    c = replace(methods[method].presets['scenes'], img_size=32, local_size=16, n_local=2, hidden_dim=64, drop_path_rate=0.)
    changes = dict(flsl=dict(n_prototypes=16, random_query=False), dino=dict(n_prototypes=32), clove=dict(num_heads=2, k=4))
    return replace(c, **changes[method])


def small_learner(method, device, n=8, bs=4, cbs=(), **kwargs):
    "A learner on drawn scenes"
    torch.manual_seed(0)
    c, (arch, model_kwargs) = small_settings(method), NETWORKS[method]
    dls = scene_dls(n, methods[method].recipe(c), bs=bs, canvas=40, device=device)
    return learner(dls, arch, methods[method], c, model_kwargs=model_kwargs, cbs=list(cbs), **kwargs)


def fit(learn, epochs=1):
    "The losses of a silent fit"
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    return [float(o) for o in learn.recorder.losses]


# ---- right?

def views_beside_cpu(method, device):
    "The same draws made into views on both"
    canvas, made = draw_scenes(6, 40, seed=3)[0], []
    for d in (torch.device('cpu'), device):
        g = torch.Generator().manual_seed(3)
        made.append(make_views(methods[method].recipe(small_settings(method)), canvas.to(d), torch.full((6, 2), 40), g))
    pairs = [(a, made[1][k]) for k,a in made[0].items()]
    far = torch.cat([(a.images-b.images.cpu()).abs().flatten() for a,b in pairs])
    same = all(torch.equal(a.boxes, b.boxes.cpu()) for a,b in pairs)
    return dict(mean=far.mean().item(), most=far.max().item(), same_boxes=same, ok=same and far.mean().item()<.01)


def gradients_of(model, loss_func, views, how, device):
    "Loss and gradients of one step, on the CPU in fp32"
    model, scale = copy.deepcopy(model).to(device), 2.**4 if how=='fp16' else 1.
    with products(how):
        with autocast(how, device): loss = loss_func(model({k: v.to(device) for k,v in views.items()}))
        (loss*scale).backward()
    grads = {k: p.grad.float().cpu()/scale for k,p in model.named_parameters() if p.grad is not None}
    return loss.item(), grads


def step_beside_cpu(method, how, device):
    "Loss and gradients of a step beside those of the CPU in fp32"
    c, (arch, kwargs), m = small_settings(method), NETWORKS[method], methods[method]
    torch.manual_seed(1)
    model = m.model(dense_encoder(arch, img_size=c.img_size, **kwargs), c).train()
    views = make_views(methods[method].recipe(c), draw_scenes(6, 40, seed=4)[0], torch.full((6, 2), 40))
    (l0, g0), (l, g) = (gradients_of(model, m.loss(c), views, h, d) for h,d in (('fp32', torch.device('cpu')), (how, device)))
    x0, x = (torch.cat([o[k].flatten() for k in g0]) for o in (g0, g))
    cosine = torch.cosine_similarity(x0, x, 0).item()
    error = abs(l-l0)/abs(l0)
    return dict(loss=l, loss_error=error, cosine=cosine, ok=math.isfinite(l) and error<.02 and cosine>PRECISIONS[how])


def learner_in(method, how, device):
    "Two epochs of a learner: are the losses numbers, and is autocast off again?"
    with products('tf32' if how=='tf32' else 'fp32'):
        learn = small_learner(method, device, bf16=how=='bf16')
        if how in ('to_fp16', 'to_bf16'): getattr(learn, how)()
        losses = fit(learn, 2)
    left_on = torch.is_autocast_enabled(device.type)
    return dict(losses=losses, left_on=left_on, ok=all(map(math.isfinite, losses)) and not left_on)


def export_from(arch, device, **kwargs):
    "The backbone that is exported from the device, with TF32 as cuDNN has it by default"
    torch.manual_seed(0)
    encoder = dense_encoder(arch, **kwargs).to(device)
    with tempfile.TemporaryDirectory() as d: res = export_backbone(encoder, Path(d)/'backbone.safetensors')
    return dict(difference=res['difference'], tf32=torch.backends.cudnn.allow_tf32, ok=True)


def resume_on(method, device):
    "A run that was cut after its first epoch and resumed, beside one that was not: the same bits, if sums have one order?"
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(device!='cpu', warn_only=True)
    try: return resumed_beside_whole(method, device)
    finally: torch.use_deterministic_algorithms(was)


def resumed_beside_whole(method, device):
    with tempfile.TemporaryDirectory() as d:
        whole = small_learner(method, device, cbs=[SaveRun(d, every=1, keep=9)])
        fit(whole, 2)
        for path in run_checkpoints(d)[:2]: path.unlink()
        resumed = small_learner(method, device, cbs=[SaveRun(d, every=1, keep=9, resume=True)])
        fit(resumed, 2)
    pairs = zip(whole.model.state_dict().items(), resumed.model.state_dict().values())
    far = {k: (a.float()-b.float()).abs().max().item() for (k, a),b in pairs if not torch.equal(a, b)}
    return dict(differ=len(far), most=max(far.values(), default=0.), ok=not far)


def scenes_with_labels(n=12, size=32):
    "Drawn scenes as a labelled set"
    x, m = draw_scenes(n, size, seed=9, natural=True)[:2]
    return [SegmentationData(x[i], m[i], len(CLASSES), name='scenes') for i in (slice(0, n*2//3), slice(n*2//3, n))]


def scores_beside_cpu(device):
    "Scores of one network on both"
    torch.manual_seed(0)
    encoder = dense_encoder(VIT[0], img_size=32, **VIT[1]).eval()
    pair = scenes_with_labels()
    found = [{s.probe: s.value for s in dense_scores(encoder.to(d), *pair, memory=500, steps=40)} for d in ('cpu', device)]
    most = max(abs(found[0][k]-found[1][k]) for k in found[0])
    return dict(cpu=found[0], device=found[1], most=most, ok=most<.03)


def pictures_of(device):
    "The pictures that a learner draws"
    learn = small_learner('flsl', device)
    drawn = [learn.show_views(2), learn.show_modes(2)]
    return dict(n=len(drawn), ok=all(o is not None for o in drawn))


def waits_of(method, device):
    "Lines of the library that wait for the device in the middle of an epoch, as torch reports them"
    import collections, warnings
    found = collections.Counter()

    def note(message, *args, **kwargs):
        f = sys._getframe(1)
        while f is not None and not {'densessl', 'fastai'} & set(Path(f.f_code.co_filename).parts): f = f.f_back
        if f is not None and 'synchron' in str(message): found[f'{Path(f.f_code.co_filename).name}:{f.f_lineno}'] += 1

    class Watch(Callback):
        order = 2000
        def after_batch(self): torch.cuda.set_sync_debug_mode('warn' if self.iter==1 else 'default')
    learn = small_learner(method, device, n=20, cbs=[Watch()], monitor_every=100)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('always')
            warnings.showwarning = note
            fit(learn)
    finally: torch.cuda.set_sync_debug_mode('default')
    return dict(lines=dict(found.most_common()), sum=sum(found.values()))


def environment(device):
    "What the numbers depend on"
    import densessl, fastai, timm
    known = {o.__name__: o.__version__ for o in (torch, timm, fastai, densessl)} | dict(cpus=len(os.sched_getaffinity(0)))
    if device.type!='cuda': return known
    card = torch.cuda.get_device_properties(0)
    return known | dict(card=card.name, GiB=round(card.total_memory/2**30, 1), bf16=torch.cuda.is_bf16_supported())


def ceilings(device, tiny):
    "What the card does at best: products in each precision, a copy"
    n, res = 256 if tiny else 8192, {}

    def seconds(f, k=5):
        f(); finish(device)
        began = time.perf_counter()
        for _ in range(k): f()
        finish(device)
        return (time.perf_counter()-began)/k
    for how,dtype in (('fp32', torch.float32), ('tf32', torch.float32), ('bf16', torch.bfloat16)):
        x = torch.randn(n, n, device=device, dtype=dtype)
        with products('tf32' if how=='tf32' else 'fp32'): res[f'{how} TFLOP/s'] = round(2*n**3/seconds(lambda: x@x)/1e12, 2)
    x = torch.zeros(2**20 if tiny else 2**30, dtype=torch.uint8, device=device)
    return res | {'copy TB/s': round(2*len(x)/seconds(x.clone)/1e12, 3)}


def right(record, device, a):
    "Stage: is it right?"
    record.put('environment', environment(device))
    record.measure('ceilings', ceilings, device, a.tiny)
    for m in NETWORKS: record.measure(f'views {m}', views_beside_cpu, m, device)
    for m in NETWORKS:
        for how in PRECISIONS if device.type=='cuda' else ('fp32', 'bf16'): record.measure(f'step {m} {how}', step_beside_cpu, m, how, device)
    for m in ('flsl',) if a.tiny else NETWORKS:
        for how in ('bf16',) if a.tiny else ('fp32', 'tf32', 'bf16', 'to_fp16', 'to_bf16'): record.measure(f'learner {m} {how}', learner_in, m, how, device)
    record.measure(f'export {CNN[0]}', export_from, CNN[0], device, img_size=32, **CNN[1])
    if not a.tiny:
        for arch in ('vit_small_patch16_224', 'resnet50'): record.measure(f'export {arch}', export_from, arch, device)
    for m in ('dino',) if a.tiny else NETWORKS: record.measure(f'resume {m}', resume_on, m, device)
    record.measure('scores', scores_beside_cpu, device)
    record.measure('pictures', pictures_of, device)
    if device.type=='cuda':
        for m in NETWORKS: record.measure(f'waits {m}', waits_of, m, device)


# ---- fast?

class Clock:
    "Milliseconds of the parts of a step: events on a GPU, the clock on a CPU"
    def __init__(self, device): self.device, self.marks = device, []

    def __call__(self, part):
        if self.device.type=='cuda':
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else: moment = time.perf_counter()
        self.marks.append((part, moment))

    def parts(self):
        "Part -> milliseconds since the mark before it; the marks are gone"
        finish(self.device)
        cuda, marks, self.marks = self.device.type=='cuda', self.marks, []
        return {name: a.elapsed_time(b) if cuda else 1e3*(b-a) for (_, a),(name, b) in zip(marks, marks[1:])}


def training_step(method, bs, device, clock, tiny, compiled):
    "A function that trains one step of the paper's settings, from bytes on the device; marks on `clock` say where it is"
    m = methods[method]
    c, (arch, kwargs) = (small_settings(method), NETWORKS[method]) if tiny else (m.presets['paper'], (m.arch, {}))
    torch.manual_seed(0)
    encoder = dense_encoder(arch, img_size=c.img_size, drop_path_rate=c.drop_path_rate, **kwargs)
    c = m.complete(c, encoder, 2**20)
    model = m.model(encoder, c).to(device).train()
    if compiled: compile_blocks(model)
    opt = (lars if method=='clove' else adamw)(split_decay(model.student), lr=1e-4)
    loss_func, params = m.loss(c), [p for p in model.student.parameters() if p.requires_grad]
    side = 40 if tiny else 256
    canvas, hw = torch.randint(256, (bs, 3, side, side), dtype=torch.uint8, device=device), torch.full((bs, 2), side)

    def step(how):
        clock('start')
        views = make_views(m.recipe(c), canvas, hw, compile=compiled)
        clock('views')
        with autocast(how, device):
            out = model(views)
            clock('forward')
            loss = loss_func(out)
        clock('loss')
        loss.backward()
        clock('backward')
        if method!='clove': clip_per_parameter_(params)
        opt.step()
        model.update_teacher(.99)
        opt.zero_grad()
        clock('update')
    return step


def speed_of(method, bs, device, how='bf16', tiny=False, compiled=False, seconds=3.):
    "Images a second of the step alone, shares of its parts, memory"
    clock = Clock(device)
    if device.type=='cuda': torch.cuda.reset_peak_memory_stats()
    began, step = time.monotonic(), training_step(method, bs, device, clock, tiny, compiled)
    with products(how):
        for _ in range(1 if tiny else 4): step(how)
        clock.parts()
        warm_up, rows, began = time.monotonic()-began, [], time.monotonic()
        while len(rows)<2 or (not tiny and len(rows)<40 and time.monotonic()-began<seconds/2):
            step(how)
            rows.append(clock.parts())
        n = 1 if tiny else max(4, int(seconds/2/sum(statistics.median(r[k] for r in rows) for k in rows[0])*1e3))
        finish(device)
        began = time.perf_counter()
        for _ in range(n): step(how)                     # without waiting for each
        finish(device)
        each = (time.perf_counter()-began)/n
    parts = {k: round(statistics.median(r[k] for r in rows), 2) for k in rows[0]}
    res = dict(images_per_second=round(bs/each, 1), step_ms=round(1e3*each, 2), parts_ms=parts, warm_up_seconds=round(warm_up, 1))
    if device.type=='cuda': res['peak_GiB'] = round(torch.cuda.max_memory_allocated()/2**30, 2)
    return res


class OnDevice(ViewLoader):
    "Batches of photographs that lie on the device: nothing is decoded or copied"
    def create_batches(self, samps):
        ds = self.dataset
        for chunk in self.chunkify(samps):
            i = torch.tensor(list(chunk))
            yield ds.images[i.to(ds.images.device, non_blocking=True)], ds.hw[i], ['']*len(i)


class Photographs:
    "Canvases as bytes, with heights and widths"
    n_inp = 1
    def __init__(self, images, hw): self.images, self.hw = images, hw
    def __len__(self): return len(self.images)
    def __getitem__(self, i): return self.images[i].cpu(), self.hw[i], ''


def dls_on_device(images, hw, recipe, bs, device):
    "DataLoaders of photographs that lie on the device"
    sets = Photographs(images, hw), Photographs(images[:0], hw[:0])
    dls = [OnDevice(ds, bs=bs, shuffle=i==0, drop_last=i==0, after_batch=MakeViews(recipe)) for i,ds in enumerate(sets)]
    dls = DataLoaders(*dls, device=device)
    dls.recipe, dls.bad_files = recipe, BadFiles(len(images))
    return dls


def learner_speed(method, bs, device, tiny, compiled=False, steps=30):
    "Images a second of the whole learner, its callbacks included"
    m, at = methods[method], []
    c, (arch, kwargs) = (small_settings(method), NETWORKS[method]) if tiny else (m.presets['paper'], (m.arch, {}))
    side, steps = (40, 4) if tiny else (256, steps)

    class Times(Callback):
        order = 3000
        def after_batch(self):
            if self.iter in (steps//3, steps-1):
                finish(device)
                at.append(time.perf_counter())
    images = torch.randint(256, (bs*steps, 3, side, side), dtype=torch.uint8, device=device)
    dls = dls_on_device(images, torch.full((len(images), 2), side), m.recipe(c), bs, device)
    fit(learner(dls, arch, m, c, model_kwargs=kwargs, bf16=True, compile=compiled, cbs=[Times()]))
    return dict(images_per_second=round(bs*(steps-1-steps//3)/(at[1]-at[0]), 1))


def decoding_speed(folder, workers, seconds=5.):
    "Photographs a second from files to canvases in memory"
    recipe = methods['flsl'].recipe(methods['flsl'].presets['paper'])
    dl = image_dls(folder, recipe, bs=16, num_workers=workers, device='cpu', pin_memory=False, seed=0).train
    dl.after_batch = lambda b: b
    began, n, first = time.perf_counter(), 0, None
    for b in dl:
        now = time.perf_counter()
        if first is None: first = now
        else: n += len(b[0])
        if now-began>seconds: break
    return dict(images_per_second=round(n/max(1e-9, now-first), 1), first_batch_seconds=round(first-began, 2), workers=workers)


def fast(record, device, a):
    "Stage: is it fast? The most telling first, as long as there is time"
    record.put('environment', environment(device))
    size = (lambda bs: 4) if a.tiny else (lambda bs: bs)
    compiled = dict(compiled=True)
    runs = [('flsl', 512, {}), ('flsl', 512, compiled), ('flsl learner', 512, {}), ('flsl learner', 512, compiled), ('clove', 256, {}),
            ('clove', 256, compiled), ('dino', 256, {}), ('dino', 256, compiled), ('clove learner', 256, {}), ('flsl', 64, {}),
            ('flsl', 64, compiled), ('flsl', 512, dict(how='tf32')), ('flsl', 256, dict(how='fp32'))]
    if a.tiny: runs = [runs[i] for i in (0, 2, 4, 6)]
    for name,bs,changes in runs:
        method, _, learner = name.partition(' ')
        label = ' '.join([name, str(size(bs)), *(k if v is True else v for k,v in changes.items())])
        left = a.limit-(time.monotonic()-BEGAN)
        if not a.tiny and left<(25 if 'compiled' in changes else 8): record.put(label, 'out of time'); continue
        if learner: record.measure(label, learner_speed, method, size(bs), device, a.tiny, **changes)
        else: record.measure(label, speed_of, method, size(bs), device, tiny=a.tiny, **changes)
    photos = pack_parts(a)['photos']
    for workers in sorted({min(8, os.cpu_count()-1), os.cpu_count()-1}) if photos else ():
        if a.limit-(time.monotonic()-BEGAN)>8: record.measure(f'decoding, {workers} processes', decoding_speed, photos, workers)


# ---- does it learn?

class Arm(NamedTuple):
    "One training of the comparison"
    method: str
    changes: dict        # Of the paper's settings
    start: str = None    # Arm whose network it goes on from
    share: float = 1.    # Of the seconds

VIEWS = dict(img_size=64, local_size=32)
SHORT = dict(momentum=(.99, 1.), temp_t=(.04, .04), drop_path_rate=0., pos_scale=.25, n_prototypes=4096)
FLSL_CHANGES = VIEWS | SHORT | dict(n_local=2)
DINO_CHANGES = VIEWS | SHORT | dict(n_local=4)
AFTER = dict(lr=.00025)
ARMS = dict(
    flsl=Arm('flsl', FLSL_CHANGES),
    dino=Arm('dino', DINO_CHANGES),
    flsl_after_dino=Arm('flsl', FLSL_CHANGES|AFTER, 'dino', .5),
    dino_after_dino=Arm('dino', DINO_CHANGES|AFTER, 'dino', .5),
    clove=Arm('clove', VIEWS|dict(n_local=4), share=.5))
LARGE = 'vit_small_patch16_224', dict(patch_size=8)
LARGE_NETWORKS = dict(flsl=LARGE, dino=LARGE, clove=('resnet50', dict(output_stride=8)))


def pack_parts(a):
    "Folders of the pack: photos, camvid, davis; None where there is none"
    if not a.pack: return dict(photos=None, camvid=None, davis=None)
    root = Path(a.pack)
    if not root.is_dir():
        root = Path(a.out)/'pack'
        if not root.is_dir():
            with zipfile.ZipFile(a.pack) as z: z.extractall(root)
    root = next((p for p in (root, *root.glob('*')) if (p/'train').is_dir()), root)
    return {k: root/d if (root/d).is_dir() else None for k,d in dict(photos='train', camvid='camvid', davis='davis').items()}


def read_some(files, side): return [load_canvas(f, side)[:2] for f in files]


def photographs(folder, side, tiny):
    "All photographs as bytes, decoded by all cores, and their heights and widths; without a folder drawn scenes"
    if folder is None:
        x = draw_scenes(24 if tiny else 2048, side, seed=0, natural=True)[0]
        return x, torch.full((len(x), 2), side)
    files, n = find_images(folder), 200
    with ProcessPoolExecutor(max(1, os.cpu_count()-1), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        parts = pool.map(read_some, (files[i:i+n] for i in range(0, len(files), n)), itertools.repeat(side))
        images, hw = zip(*(o for part in parts for o in part))
    return torch.stack(images), torch.stack([torch.as_tensor(o) for o in hw])


def scores_of(encoder, data, videos=True):
    "Nearest neighbor, linear probe, correspondence, DAVIS"
    encoder.eval()
    res = {s.probe: s.value for s in dense_scores(encoder, *data['labelled'], memory=20000)}
    res['correspondence'] = correspondence_score(encoder, data['photos'], data['hw'], data['size']).value
    if data['davis'] and videos: res |= {s.probe: s.value for s in davis_score(encoder, data['davis'], size=120)}
    return {k: round(v, 4) for k,v in res.items()}


def score(record, device, a):
    "Scores of the backbone that `a.arm` names"
    encoder = open_backbone(a.out/f'{a.arm}.safetensors', verbose=False)[0].to(device)
    parts, kept = pack_parts(a), torch.load(a.out/'kept.pt')
    labelled = labelled_data(parts['camvid'], size=(176, 240), say=None) if parts['camvid'] else scenes_with_labels()
    data = kept | dict(labelled=labelled, davis=parts['davis'])
    record.measure('scores', scores_of, encoder, data, videos='half' not in a.arm)


class Scorers:
    "Scores backbones in processes beside the training"
    def __init__(self, a, device): self.a, self.device, self.running = a, device, []

    def __call__(self, name, model):
        export_backbone(model, self.a.out/f'{name}.safetensors', overwrite=True)
        a = argparse.Namespace(**vars(self.a)|dict(arm=name))
        if a.tiny: return score(Record(a.out/f'scores_{name}.json'), self.device, a)
        command = [sys.executable, __file__, '--child', 'score', '--arm', name, '--out', str(a.out), '--pack', str(a.pack)]
        self.running.append(subprocess.Popen(command, env=dict(os.environ, OMP_NUM_THREADS='2')))

    def wait(self, seconds):
        "Until they have ended, or the seconds are over"
        until = time.monotonic()+seconds
        for p in self.running:
            try: p.wait(max(.1, until-time.monotonic()))
            except subprocess.TimeoutExpired: p.kill()


class ByTheClock(Callback):
    "Schedules follow the seconds that were trained, and the fit ends with them; the first steps do not count, nor what is done half-way"
    order, run_valid = -5, False           # after fastai's own count of progress, before the schedules
    def __init__(self, seconds, half_way, warm_up=3):
        self.seconds, self.half_way, self.warm_up = seconds, half_way, warm_up
        self.trained, self.steps, self.begun = 0., 0, None

    def before_batch(self):
        now = time.monotonic()
        if self.begun is not None: self.trained += now-self.begun
        if self.trained>self.seconds/2 and self.half_way:
            self.half_way, do = None, self.half_way
            do()
            now = time.monotonic()
        self.steps += 1
        if self.steps>self.warm_up: self.begun = now
        self.learn.pct_train = min(1., self.trained/self.seconds)
        if self.trained>=self.seconds: raise CancelFitException()


def learn_arm(name, arm, record, images, hw, scorers, device, a):
    "Train one arm for its share of the seconds"
    m = methods[arm.method]
    c, (arch, kwargs) = replace(m.presets['paper'], **arm.changes), LARGE_NETWORKS[arm.method]
    if a.tiny: c, (arch, kwargs) = small_settings(arm.method), NETWORKS[arm.method]
    own = dict(o.split(':', 1) for o in a.settings or ()).get(name)
    if own: c = change_settings(c, parse_kwargs(own, 'settings'))
    bs, seconds, init = 4 if a.tiny else a.bs, arm.share*(1. if a.tiny else a.seconds), {}
    if arm.start: init['init'] = a.out/f'{arm.start}.safetensors'
    torch.manual_seed(a.seed)
    dls = dls_on_device(images, hw, m.recipe(c), bs, device)
    learn = learner(dls, arch, m, c, model_kwargs=kwargs, monitor_every=5 if a.tiny else 25, compile=a.compile, **init)
    clock = ByTheClock(seconds, lambda: scorers(f'{name}_half', learn))
    learn.add_cb(clock)
    losses = fit(learn, 10**5)
    scorers(name, learn)
    every, curves = max(1, len(losses)//100), learn.collapse_monitor.history
    steps = clock.steps-clock.warm_up
    record.put(name, dict(
        bs=bs, arch=arch, model_kwargs=kwargs, start=arm.start, config=vars(c), seconds=round(clock.trained, 1), steps=clock.steps,
        images_per_second=round(steps*bs/clock.trained, 1), passes=round(clock.steps*bs/len(images), 1), losses=losses[::every],
        lr=[r['lr'] for r in learn.schedules.history[::every]], curves=curves[::max(1, len(curves)//60)]))
    learn.show_modes(3).savefig(record.path.with_name(f'modes_{name}.png'), dpi=100)


def random_starts(names, recipe, images, hw, scorers, device, a):
    "Networks as they are before any training, from several seeds, with statistics gathered where they have any"
    for kind,arch,kwargs in names:
        for seed in range(1 if a.tiny else 3):
            torch.manual_seed(seed)
            pos = dict(pos_scale=.25) if 'vit' in arch else {}
            encoder = dense_encoder(arch, img_size=recipe.crops[0].size, **pos, **kwargs).to(device)
            if has_batch_norm(encoder):
                gather_statistics(encoder, training_views(dls_on_device(images[:2048], hw[:2048], recipe, 4 if a.tiny else 128, device)))
            scorers(f'start_{kind}_{seed}', encoder)


def learns(record, device, a):
    "Stage: does it learn? All arms, one after the other; backbones are scored in processes beside them"
    record.put('environment', environment(device))
    images, hw = photographs(pack_parts(a)['photos'], 40 if a.tiny else 96, a.tiny)
    n, arms = min(64, len(images)//4), a.arms.split(',')
    torch.save(dict(photos=images[:n], hw=hw[:n], size=32 if a.tiny else 64), a.out/'kept.pt')
    images, hw = images[n:].to(device), hw[n:]
    record.put('photographs', dict(train=len(images), kept=n))
    scorers, networks = Scorers(a, device), NETWORKS if a.tiny else LARGE_NETWORKS
    kinds = {'cnn' if ARMS[o].method=='clove' else 'vit': networks[ARMS[o].method] for o in arms}
    first = ARMS[arms[0]]
    recipe = methods[first.method].recipe(small_settings(first.method) if a.tiny else replace(methods[first.method].presets['paper'], **first.changes))
    random_starts([(k, *v) for k,v in kinds.items()], recipe, images, hw, scorers, device, a)
    for name in arms:
        need = ARMS[name].share*a.seconds+15
        if not a.tiny and a.limit-(time.monotonic()-BEGAN)<need: record.put(name, 'out of time'); continue
        try: learn_arm(name, ARMS[name], record, images, hw, scorers, device, a)
        except Exception as e: record.put(name, dict(error=''.join(traceback.format_exception(e))[-1500:]))
        if device.type=='cuda': torch.cuda.empty_cache()
    scorers.wait(a.limit-(time.monotonic()-BEGAN) if math.isfinite(a.limit) else 600)


# ---- tables

def tables(out):
    "What the JSON files of a folder say, as text"
    lines = []
    for stage in ('right', 'fast'):
        path = out/f'{stage}.json'
        if not path.exists(): continue
        lines.append(f'\n{stage}')
        for name,v in json.loads(path.read_text()).items():
            if not isinstance(v, dict) or name=='environment': continue
            shown = {k: x for k,x in v.items() if k not in ('ok', 'seconds', 'at', 'losses')}
            mark = {True: 'ok', False: 'WRONG', None: ''}[v.get('ok')]
            lines.append(f'  {name:<32} {mark:<6} {json.dumps(shown)[:150]}')
    rows = {p.stem.removeprefix('scores_'): json.loads(p.read_text()).get('scores', {}) for p in sorted(out.glob('scores_*.json'))}
    names = list(dict.fromkeys(k for r in rows.values() for k,v in r.items() if isinstance(v, float) and k!='seconds'))
    if rows: lines.append('\nlearns' + ' '*18 + ' '.join(f'{k[:18]:>18}' for k in names))
    for name,r in rows.items():
        lines.append(f'  {name:<22}' + ' '.join(f'{100*r[k]:>18.1f}' if k in r else ' '*18 for k in names) + str(r.get('error', '')))
    return '\n'.join(lines)


# ---- the stages, each in a process of its own

STAGES = dict(right=right, fast=fast, learns=learns)


def run_stage(a):
    "One stage in this process"
    device = torch.device('cuda', 0) if torch.cuda.is_available() and not a.tiny else torch.device('cpu')
    record = Record(a.out/(f'scores_{a.arm}.json' if a.child=='score' else f'{a.child}.json'))
    try: (STAGES|dict(score=score))[a.child](record, device, a)
    except Exception as e:
        record.put('ended by', ''.join(traceback.format_exception(e))[-2000:])
        return 1
    return 0


def main(args=None):
    P = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    P.add_argument('stages', nargs='*', help='right, fast, learns; default all')
    P.add_argument('--out', type=Path, default=Path(os.environ.get('OUT', 'gpu_results')))
    P.add_argument('--pack', help='zip file or folder with train/, camvid/, davis/')
    P.add_argument('--arms', default=','.join(ARMS), help='of learns')
    P.add_argument('--seconds', type=float, default=80., help='that an arm trains, times its share')
    P.add_argument('--settings', nargs='*', help='of arms, as flsl:beta_sa=5,beta_ca=10')
    P.add_argument('--compile', action='store_true', help='arms of learns are compiled')
    P.add_argument('--limits', default='', help='seconds of stages, as learns=400')
    P.add_argument('--bs', type=int, default=2048)
    P.add_argument('--seed', type=int, default=0)
    P.add_argument('--tiny', action='store_true', help='in miniature, on the CPU, in this process')
    P.add_argument('--child')
    P.add_argument('--arm')
    P.add_argument('--limit', type=float, default=math.inf)
    a = P.parse_args(args)
    a.out.mkdir(parents=True, exist_ok=True)
    if a.child: return run_stage(a)
    if wrong := [s for s in a.stages if s not in STAGES]: P.error(f'no stage {wrong[0]}: choose from {", ".join(STAGES)}')
    if wrong := [o for o in a.arms.split(',') if o not in ARMS]: P.error(f'no arm {wrong[0]}: choose from {", ".join(ARMS)}')
    limits, codes = LIMITS | {k: float(v) for k,v in (o.split('=') for o in a.limits.split(',') if o)}, []
    for stage in a.stages or STAGES:
        a.child = stage
        if a.tiny: codes.append(run_stage(a)); continue
        given = sys.argv[1:] if args is None else list(args)
        command = [sys.executable, __file__, *given, '--child', stage, '--limit', str(limits[stage])]
        try: codes.append(subprocess.run(command, timeout=limits[stage]+5, env=dict(os.environ, PYTHONUNBUFFERED='1')).returncode)
        except subprocess.TimeoutExpired: codes.append(f'stopped after {limits[stage]:.0f} s')
    print(tables(a.out), flush=True)
    return int(any(codes))


if __name__=='__main__': sys.exit(main())
