"""Folder or shards? Photographs a second from files to canvases, and what it takes to write the shards.

    python benchmarks/data.py FOLDER [--repeats 5] [--save results.json]

Four photographs of FOLDER at a time are put together to one of twice the size, until there are enough of the size of ImageNet's. These as files, as
tar files of 100, and as tar files reduced to 256 pixels: bytes alone and with decoding, with one and with two worker processes, from the memory of the
system (warm) and after it was asked to forget them (cold). Runs are interleaved and medians printed; on a shared machine the CPU milliseconds of an
image say more than the images a second.
"""
import argparse, json, os, statistics, tempfile, time, tracemalloc
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image

from common import machine
from densessl.data.folders import find_images
from densessl.data.images import image_dls
from densessl.data.photographs import load_canvas, read_photo
from densessl.data.shards import shard_dls, shard_list, write_shards
from densessl.data.tar_files import tar_photographs
from densessl.methods.flsl import FLSLConfig, flsl_recipe

RECIPE = flsl_recipe(FLSLConfig())

def mosaics(files, n, out):
    "Photographs of about 500 x 400 pixels with as much detail as there is in small ones"
    out.mkdir()
    for i in range(n):
        four = [read_photo(files[(4*i+k)%len(files)], 1<<20)[0] for k in range(4)]
        w, h = (min(o.size[d] for o in four) for d in (0, 1))
        im = Image.new('RGB', (2*w, 2*h))
        for k,o in enumerate(four): im.paste(o.crop((0, 0, w, h)), (k%2*w, k//2*h))
        im.save(out/f'{i:05}.jpg', quality=90)

def forget(paths):
    "Ask the system to drop these files from its memory"
    for p in paths:
        fd = os.open(p, os.O_RDONLY)
        try: os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally: os.close(fd)

def cpu():
    "CPU seconds of this process and of the workers that have ended"
    t = os.times()
    return t.user+t.system+t.children_user+t.children_system

def bytes_of_folder(files):
    for f in files: f.read_bytes()

def bytes_of_shards(shards):
    for o in shards:
        for i in range(o.n): o.read(i)

def epoch(dls):
    "One epoch of canvases, no views"
    dls.train.after_batch = lambda b: b
    return sum(len(b[0]) for b in dls.train)

def main():
    P = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    P.add_argument('folder'); P.add_argument('--repeats', type=int, default=5); P.add_argument('--save'); P.add_argument('--bs', type=int, default=64); P.add_argument('--n', type=int, default=500)
    a = P.parse_args()
    torch.set_num_threads(1)
    print(machine(1))
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as tmp:
        mosaics(find_images(a.folder), a.n, Path(tmp)/'folder')
        began = time.perf_counter(); files = find_images(f'{tmp}/folder'); listed = time.perf_counter()-began
        tracemalloc.start(); again = find_images(f'{tmp}/folder'); held = tracemalloc.get_traced_memory()[0]; tracemalloc.stop(); del again
        n, size = len(files), sum(f.stat().st_size for f in files)
        res = dict(machine=machine(1), photographs=n, kB_an_image=size/n/1e3, path_bytes=held/n, list_us=listed/n*1e6)
        for name,kw in (('copied', {}), ('reduced', dict(size=256))):
            c, began = cpu(), time.perf_counter()
            d = write_shards(f'{tmp}/folder', f'{tmp}/{name}', per_shard=100, workers=1, **kw)
            res[f'write_{name}'] = dict(cpu_ms=(cpu()-c)/n*1e3, per_s=n/(time.perf_counter()-began), kB_an_image=d['bytes']/d['images']/1e3)
        sets = {k: shard_list(f'{tmp}/{k}') for k in ('copied', 'reduced')}
        began = time.perf_counter(); shard_list(f'{tmp}/copied'); res['index_us'] = (time.perf_counter()-began)/n*1e6
        began = time.perf_counter(); [tar_photographs(o.path) for o in sets['copied']]; res['headers_us'] = (time.perf_counter()-began)/n*1e6
        for name,kind in (('', 'copied'), ('_reduced', 'reduced')):
            raw, times = [o.read(i) for o in sets[kind] for i in range(o.n)][:300], []
            for _ in range(a.repeats):
                c = time.process_time()
                for b in raw: load_canvas(BytesIO(b), 256)
                times.append((time.process_time()-c)/len(raw)*1e3)
            res[f'decode{name}_ms'] = statistics.median(times)
        def dls(kind, w):
            kw = dict(bs=a.bs, num_workers=w, device='cpu', drop_last=False, cache=False)
            return image_dls(f'{tmp}/folder', RECIPE, **kw) if kind=='folder' else shard_dls(f'{tmp}/{kind}', RECIPE, **kw)
        variants = {'folder, bytes': lambda: bytes_of_folder(files), 'shards, bytes': lambda: bytes_of_shards(sets['copied'])}
        for w in (1, 2):
            for kind,title in (('folder', 'folder'), ('copied', 'shards'), ('reduced', 'shards of 256 px')):
                variants[f'{title}, {w} worker{"s"*(w>1)}'] = lambda d=dls(kind, w): epoch(d)
        everything = {k: files if k.startswith('folder') else [o.path for o in sets['reduced' if '256' in k else 'copied']] for k in variants}
        runs = {}
        for r in range(a.repeats):
            for k,f in variants.items():
                for state in ('cold', 'warm'):
                    if state=='cold': forget(everything[k])
                    c, began = cpu(), time.perf_counter()
                    f()
                    runs.setdefault((k, state), []).append((n/(time.perf_counter()-began), (cpu()-c)/n*1e3))
        res['runs'] = [dict(what=k, state=s, per_s=statistics.median(o[0] for o in v), cpu_ms=statistics.median(o[1] for o in v)) for (k,s),v in runs.items()]
    for o in res['runs']: print(f'{o["what"]:28} {o["state"]}: {o["per_s"]:7.0f} images/s, {o["cpu_ms"]:.2f} ms of CPU an image')
    print(json.dumps({k: v for k,v in res.items() if k!='runs'}, indent=1))
    if a.save: Path(a.save).write_text(json.dumps(res, indent=1)+'\n')

if __name__=='__main__': main()
