"""Kill a run at random moments, again and again, and see whether it ends as the run that was never killed.

    python experiments/soak_resume.py --tries 60 --out nbs/experiments/results/soak_signals.json

Each try starts a run of several epochs with its progress bar in a process of its own (FLSL, CLoVE or DINO; a folder of photographs; with or without
gradient accumulation; each start with another number of workers), ends it with SIGKILL, SIGTERM or SIGINT after a random time, starts it again, perhaps
ends that one too, and lets the last one go to the end. All that the run leaves
is compared with a run that was not disturbed: tensors of model and optimizer, curves, table, histories, random states. The last lines give the seconds
that a checkpoint costs for a ViT-S/16 with FLSL."""
import argparse, json, multiprocessing as mp, os, random, shutil, signal, sys, tempfile, time, warnings
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np, torch
from fastai.callback.training import GradientAccumulation
from PIL import Image

from densessl.training.resume import SaveRun
from densessl.training.runfile import read_checkpoint, read_header, run_checkpoints
from densessl.data.images import image_dls, scene_dls
from densessl.training.learner import learner, methods

VIT = 'vit_tiny_patch16_224', dict(patch_size=8, embed_dim=24, depth=2, num_heads=3)
EPOCHS, SIGNALS = 4, (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
SMALL = dict(flsl=(dict(hidden_dim=32, bottleneck_dim=16, n_prototypes=16, drop_path_rate=.2), *VIT), clove=(dict(hidden_dim=32, out_dim=16, num_heads=2, n_local=2, optimizer='lars', lr=1.), 'test_resnet', dict(output_stride=8)),
             dino=(dict(hidden_dim=32, bottleneck_dim=16, n_prototypes=16, n_local=2), *VIT))


def photographs(folder, n=24):
    rng = np.random.default_rng(0)
    for i in range(n): Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((40+i, 40), Image.Resampling.BICUBIC).save(folder/f'{i:02}.jpg')


def make(method, photos, workers, accumulate, seed=0):
    m, (change, arch, kwargs) = methods[method], SMALL[method]
    config = replace(m.presets['scenes'], img_size=32, local_size=16, **change)
    random.seed(seed); np.random.seed(seed); torch.manual_seed(seed)
    dls = image_dls(photos, m.recipe(config), bs=4, seed=0, num_workers=workers)
    return learner(dls, arch, m, config, model_kwargs=kwargs, monitor_every=2, cbs=[GradientAccumulation(12)] if accumulate else [])


def work(out, method, photos, workers, accumulate, folder=None):
    "A whole run, or the rest of one"
    os.setsid()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)      # as in a terminal
    with open(os.devnull, 'w') as null:
        os.dup2(null.fileno(), 1); os.dup2(null.fileno(), 2)
        fresh = folder is None or not run_checkpoints(folder)
        learn = make(method, photos, workers, accumulate, seed=0 if fresh else os.getpid())     # other weights and generators: nothing but the checkpoint helps
        warnings.simplefilter('ignore')
        learn.fit(EPOCHS, cbs=SaveRun(folder, every=1, resume=True) if folder else [])
    r, opt = learn.recorder, learn.opt.state_dict()
    tensors = dict(**learn.model.state_dict(), **{f'optimizer.{i}.{k}': torch.as_tensor(v) for i,s in opt['state'].items() for k,v in s.items()}, losses=torch.stack([*r.losses]), draws=torch.rand(4))
    rest = dict(groups=opt['param_groups'], values=[list(v) for v in r.values], schedules=learn.schedules.history, monitor=learn.collapse_monitor.history, order=learn.dls.train.rng.getstate(),
                python=random.getstate(), numpy=str(np.random.get_state()))
    torch.save((tensors, {k: repr(v) for k,v in rest.items()}), out.with_suffix('.part'))
    os.replace(out.with_suffix('.part'), out)


def start(*args):
    p = mp.get_context('fork').Process(target=work, args=args)
    p.start()
    return p


def moment(folder):
    "Where the kill has hit"
    found = run_checkpoints(folder)
    if list(folder.glob('*.part')): return 'inside a write'
    if not found: return 'before the first checkpoint'
    h = read_header(found[0])
    return 'after the end' if h['epoch']==h['epochs'] else 'inside an epoch' if 0<h['batch']<h['batches'] else 'between epochs'


def difference(got, want):
    "Largest difference of a tensor, and names of all that is not equal to the last bit"
    (a, ra), (b, rb) = got, want
    if a.keys()!=b.keys(): return float('inf'), ['other names']
    unequal = [k for k in b if not torch.equal(a[k], b[k])]
    return max([(a[k].double()-b[k].double()).abs().max().item() for k in unequal], default=0.), unequal + [k for k in rb if ra[k]!=rb[k]]


def soak(tries, seed, home):
    rng, photos, hits, sent, worst, failed, kills = random.Random(seed), home/'photos', Counter(), Counter(), 0., [], 0
    photos.mkdir()
    photographs(photos)
    want, seconds = {}, {}
    for i in range(tries):
        method, accumulate = list(methods)[i%3], rng.random()<.5
        kind = method, photos, 0, accumulate
        if (method, accumulate) not in want:
            start(home/'straight', *kind).join()
            want[method, accumulate] = torch.load(home/'straight', weights_only=True)
        folder, out = home/f'run{i}', home/f'out{i}'
        while not out.exists():
            began, p = time.time(), start(out, method, photos, rng.choice((0, 1, 2)), accumulate, folder)
            if kind not in seconds:                                # the first of its kind is left alone: how long does it take?
                p.join()
                seconds[kind] = time.time()-began
                out.unlink(); shutil.rmtree(folder)
                continue
            p.join(rng.random()*seconds[kind]) if rng.random()<.8 or not folder.exists() else p.join()
            if p.is_alive():
                signum = rng.choice(SIGNALS)
                os.kill(p.pid, signum)
                p.join()
                kills += 1
                sent[signum.name] += 1
                hits[moment(folder)] += 1
            elif p.exitcode: failed.append((i, method, f'exit code {p.exitcode}')); break
        if out.exists():
            d, names = difference(torch.load(out, weights_only=True), want[method, accumulate])
            worst = max(worst, d)
            if names: failed.append((i, method, accumulate, names[:5]))
            out.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        if (i+1)%10==0: print(f'{i+1} runs, {kills} kills, {len(failed)} failed', flush=True)
    return dict(runs=tries, survived=tries-len(failed), epochs=EPOCHS, kills=kills, signals=dict(sent), hits=dict(hits), largest_difference=worst, failed=failed)


def cost(home, arch='vit_small_patch16_224'):
    "Seconds and bytes of a checkpoint of a ViT-S/16 with FLSL"
    m = methods['flsl']
    config = replace(m.presets['paper'], n_prototypes=16)
    learn = learner(scene_dls(4, m.recipe(config), bs=2), arch, m, config)
    learn.remove_cb(learn.progress)
    cb, seconds = SaveRun(home/'cost', every=1), []
    write = cb.checkpoints.write
    def timed(*args):
        began = time.perf_counter()
        path = write(*args)
        seconds.append(round(time.perf_counter()-began, 2))
        return path
    cb.checkpoints.write = timed
    with redirect_stdout(None), learn.no_logging(): learn.fit(1, cbs=cb)
    path = run_checkpoints(home/'cost')[0]
    began = time.time()
    read_checkpoint(path)
    return dict(arch=arch, seconds=seconds, megabytes=round(path.stat().st_size/1e6), seconds_to_read=round(time.time()-began, 2), params=sum(p.numel() for p in learn.model.student.parameters()))


if __name__=='__main__':
    args = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    args.add_argument('--tries', type=int, default=60)
    args.add_argument('--seed', type=int, default=0)
    args.add_argument('--skip_cost', action='store_true')
    args.add_argument('--out', help='JSON file to write')
    args = args.parse_args()
    home = Path(tempfile.mkdtemp())
    try:
        res = soak(args.tries, args.seed, home)
        print(json.dumps(res, indent=1, default=str))
        print(f"{res['survived']} of {res['runs']} runs survived {res['kills']} kills; the largest difference is {res['largest_difference']}")
        if not args.skip_cost: print(json.dumps(res := res | dict(checkpoint=cost(home))))
        if args.out: Path(args.out).write_text(json.dumps(res, indent=1, default=str))
    finally: shutil.rmtree(home)
    sys.exit(bool(res['failed']))
