"""What an epoch costs from the second on, with kept canvases and without: seconds of the wall and of CPU.

    python benchmarks/kept.py [--n 500] [--repeats 5] [--bs 64]

Drawn scenes of 384 x 256 pixels as JPEG files; batches of canvases alone, and with the views of FLSL (224 and 2 x 96). Epochs are interleaved, medians
are printed; CPU seconds count those of the processes that decode.
"""
import argparse, os, statistics, tempfile, time, warnings
from pathlib import Path

import torch
from PIL import Image

from common import machine
from densessl.data.images import MakeViews, image_dls
from densessl.methods.flsl import FLSLConfig, flsl_recipe
from densessl.ground.synthetic import draw_scenes

class Canvases(MakeViews):
    "Batches of canvases, without views"
    def __call__(self, b): return b if len(b)==3 else self.kept.whole(*b)

def cpu():
    "CPU seconds of this process and of those that have ended"
    t = os.times()
    return t.user+t.system+t.children_user+t.children_system

def epoch(dl):
    c, began = cpu(), time.perf_counter()
    for _ in dl: pass
    return time.perf_counter()-began, cpu()-c

def main():
    P = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    P.add_argument('--n', type=int, default=500); P.add_argument('--repeats', type=int, default=5); P.add_argument('--bs', type=int, default=64)
    a = P.parse_args()
    torch.set_num_threads(1)
    print(machine(1))
    with tempfile.TemporaryDirectory() as tmp:
        for i,x in enumerate(draw_scenes(a.n, 384, natural=True)[0]): Image.fromarray(x[:,:256].permute(1,2,0).contiguous().numpy()).save(Path(tmp)/f'{i:05}.jpg', quality=90)
        def loader(cache, workers, views):
            dl = image_dls(tmp, flsl_recipe(FLSLConfig()), bs=a.bs, num_workers=workers, seed=0, device='cpu', cache=cache).train
            if not views: dl.after_batch = Canvases(dl.after_batch.recipe, kept=dl.after_batch.kept)
            return dl
        variants = {(views, workers, cache): loader(cache, workers, views) for views in (False, True) for workers in (0, 1) for cache in (False, True)}
        runs = {k: [] for k in variants}
        for r in range(a.repeats+1):
            for k,dl in variants.items(): runs[k].append(epoch(dl))
    print(f'\nan epoch of {a.n} photographs, medians of {a.repeats} after the first')
    print(f'{"":44}{"first: s":>10}{"then: s":>10}{"CPU s":>8}')
    for (views, workers, cache),times in runs.items():
        what = f'{"views" if views else "canvases"}, {workers} process{"es"*(workers!=1)} to decode, {"kept" if cache else "not kept"}'
        wall, busy = (statistics.median(t[k] for t in times[1:]) for k in (0, 1))
        print(f'{what:44}{times[0][0]:10.2f}{wall:10.2f}{busy:8.2f}')

if __name__=='__main__':
    warnings.simplefilter('ignore')
    main()
